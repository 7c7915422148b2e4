//! The way of a leased tunnel from the worker that accepted it to the one that has the flow which moves to it. Once for a
//! flow that becomes bulk, and only if the kernel gave the tunnel to another worker: never on the path of a message.

use std::io;
use std::net::TcpStream;
use std::sync::Mutex;

use tokio::sync::mpsc;

use super::descriptors;
use crate::tunnel::info::TunnelInfo;
use crate::tunnel::oct::frame::Continue;
use crate::tunnel::tls::record::Session;

/// Tunnels that may wait at one door.
const WAITING: usize = 64;

/// What passes a door, with its socket.
#[derive(Debug)]
pub struct Passage {
    /// Keys and counters.
    pub session: Session,
    /// Who is at the ends.
    pub info: TunnelInfo,
    /// The flow that it is for.
    pub of: Continue,
}

/// Why a tunnel did not pass.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The other worker has as many as it takes, or is ending.
    #[error("the other worker takes no more tunnels at the moment")]
    Closed,
    /// The socket did not pass.
    #[error("the tunnel's socket could not be passed: {0}")]
    Io(#[from] io::Error),
}

/// One worker's door, seen from the others.
#[derive(Debug)]
pub struct Door {
    /// Held while a socket and what belongs to it are passed, so that they stay in the same order.
    order: Mutex<()>,
    sockets: descriptors::Sender,
    passages: mpsc::Sender<Passage>,
}

/// The same door, from inside.
#[derive(Debug)]
pub struct Inside {
    sockets: descriptors::Receiver,
    passages: mpsc::Receiver<Passage>,
}

/// A door. To be made before any worker leaves the common table of descriptors.
pub fn door() -> io::Result<(Door, Inside)> {
    let (sender, receiver) = descriptors::pair()?;
    let (passages, incoming) = mpsc::channel(WAITING);
    let door = Door { order: Mutex::new(()), sockets: sender, passages };
    Ok((door, Inside { sockets: receiver, passages: incoming }))
}

impl Door {
    /// Passes a tunnel. If it cannot be passed, it is lost: its peer sees it close, and the flow stays where it is.
    pub fn pass(&self, socket: &TcpStream, passage: Passage) -> Result<(), DoorError> {
        let _order = self.order.lock().map_err(|_| DoorError::Closed)?;
        let place = self.passages.try_reserve().map_err(|_| DoorError::Closed)?;
        self.sockets.pass(socket)?;
        place.send(passage);
        Ok(())
    }
}

impl Inside {
    /// The next tunnel; `None` once nobody can send any.
    pub async fn next(&mut self) -> Option<(io::Result<TcpStream>, Passage)> {
        let passage = self.passages.recv().await?;
        Some((self.sockets.take().map(TcpStream::from), passage))
    }
}
