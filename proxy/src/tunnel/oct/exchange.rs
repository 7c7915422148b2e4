//! One flow's exchange of frames on a tunnel: which frame may come next, and when the tunnel is free again.
//!
//! The opener sends OPEN and may send data right behind it; the acceptor answers ACCEPT or REFUSE before anything else.
//! Each direction ends once: with FIN (in order) or RESET (cut); REFUSE ends the acceptor's direction. Who sent RESET or
//! was refused throws away what still arrives until the peer has ended its direction too. A tunnel whose two directions
//! have ended is free for the next flow.

use super::frame::Kind;

/// Which end of the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Sends OPEN: the TLS client.
    Opener,
    /// Answers: the TLS server.
    Acceptor,
}

/// How a direction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Nothing was sent yet that starts this direction.
    Waiting,
    /// Data may flow.
    Running,
    /// Ended in order.
    Finished,
    /// Cut.
    Cut,
}

impl Direction {
    /// Whether nothing more comes.
    pub fn ended(self) -> bool {
        matches!(self, Self::Finished | Self::Cut)
    }
}

/// A frame at a moment when it is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer broke the protocol: {kind:?} while its direction is {direction:?}")]
pub struct Violation {
    /// What arrived.
    pub kind: Kind,
    /// The state it arrived in.
    pub direction: Direction,
}

/// The state of one flow on a tunnel.
#[derive(Clone, Debug)]
pub struct Exchange {
    role: Role,
    local: Direction,
    remote: Direction,
}

impl Exchange {
    /// A free tunnel, seen from `role`.
    pub fn new(role: Role) -> Self {
        Self { role, local: Direction::Waiting, remote: Direction::Waiting }
    }

    /// Our own direction.
    pub fn local(&self) -> Direction {
        self.local
    }

    /// The peer's direction.
    pub fn remote(&self) -> Direction {
        self.remote
    }

    /// Both directions have ended: the tunnel is free.
    pub fn is_over(&self) -> bool {
        self.local.ended() && self.remote.ended()
    }

    /// Data that arrives now goes to nobody.
    pub fn discards(&self) -> bool {
        self.local == Direction::Cut
    }

    /// Whether the peer's answer is still to come (opener), or ours (acceptor).
    pub fn unanswered(&self) -> bool {
        match self.role {
            Role::Opener => self.remote == Direction::Waiting,
            Role::Acceptor => self.local == Direction::Waiting,
        }
    }

    /// Notes a frame of ours. Panics never; a frame that we must not send is a bug that the tests of this module find.
    pub fn sent(&mut self, kind: Kind) {
        debug_assert!(
            !self.local.ended() || (kind == Kind::Reset && self.local == Direction::Finished),
            "{kind:?} sent after the end of our direction"
        );
        self.local = match kind {
            Kind::Open | Kind::Continue | Kind::Accept | Kind::Data => Direction::Running,
            Kind::Fin => Direction::Finished,
            Kind::Refuse | Kind::Reset => Direction::Cut,
            // Neither changes what a direction may carry.
            Kind::Credit | Kind::Move => self.local,
        };
    }

    /// A direction of the peer that may have ended in order was cut after all (shared tunnels only: on a leased one, the
    /// tunnel itself is closed for that).
    pub fn cut_late(&mut self) -> Result<(), Violation> {
        if self.remote == Direction::Finished {
            self.remote = Direction::Cut;
            return Ok(());
        }
        self.received(Kind::Reset)
    }

    /// Judges a frame of the peer.
    pub fn received(&mut self, kind: Kind) -> Result<(), Violation> {
        let violation = Violation { kind, direction: self.remote };
        self.remote = match (self.role, self.remote, kind) {
            (Role::Acceptor, Direction::Waiting, Kind::Open | Kind::Continue)
            | (Role::Opener, Direction::Waiting, Kind::Accept)
            | (_, Direction::Running, Kind::Data) => Direction::Running,
            (Role::Opener, Direction::Waiting, Kind::Refuse) | (_, Direction::Running, Kind::Reset) => Direction::Cut,
            (_, Direction::Running, Kind::Fin) => Direction::Finished,
            _ => return Err(violation),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Two ends on virtual wires: each step lets one end send something legal or receive the oldest frame.
    struct Pair {
        ends: [Exchange; 2],
        wires: [VecDeque<Kind>; 2],
    }

    impl Pair {
        fn new() -> Self {
            let mut pair = Self {
                ends: [Exchange::new(Role::Opener), Exchange::new(Role::Acceptor)],
                wires: [VecDeque::new(), VecDeque::new()],
            };
            pair.send(0, Kind::Open);
            pair
        }

        fn send(&mut self, end: usize, kind: Kind) {
            self.ends[end].sent(kind);
            self.wires[end].push_back(kind);
        }

        /// What the end may send now.
        fn choices(&self, end: usize) -> &'static [Kind] {
            let exchange = &self.ends[end];
            match (end, exchange.local(), exchange.remote()) {
                (1, Direction::Waiting, Direction::Waiting) => &[],
                (1, Direction::Waiting, Direction::Cut) => &[Kind::Refuse],
                (1, Direction::Waiting, _) => &[Kind::Accept, Kind::Refuse],
                // After a cut, only our own end may follow.
                (_, Direction::Running, Direction::Cut) => &[Kind::Reset],
                (_, Direction::Running, _) => &[Kind::Data, Kind::Fin, Kind::Reset],
                _ => &[],
            }
        }

        fn deliver(&mut self, to: usize) -> bool {
            let Some(kind) = self.wires[1 - to].pop_front() else { return false };
            self.ends[to].received(kind).expect("a legal peer never violates the protocol");
            true
        }
    }

    proptest! {
        #[test]
        fn two_legal_ends_never_violate_and_always_become_free(
            steps in prop::collection::vec((0_usize..2, any::<bool>(), 0_usize..3), 0..60),
        ) {
            let mut pair = Pair::new();
            for (end, deliver, choice) in steps {
                if deliver {
                    pair.deliver(end);
                } else if let Some(kind) = pair.choices(end).get(choice) {
                    pair.send(end, *kind);
                }
            }
            // Both now want to end as fast as they can.
            for _ in 0..200 {
                for end in 0..2 {
                    while pair.deliver(end) {}
                    if let Some(kind) = pair.choices(end).last() {
                        pair.send(end, *kind);
                    }
                }
            }
            prop_assert!(pair.ends.iter().all(Exchange::is_over));
            prop_assert!(pair.wires.iter().all(VecDeque::is_empty));
        }
    }

    #[test]
    fn frames_out_of_turn_are_violations() {
        let cases = [
            (Role::Acceptor, &[Kind::Data][..]),
            (Role::Acceptor, &[Kind::Open, Kind::Open]),
            (Role::Acceptor, &[Kind::Open, Kind::Accept]),
            (Role::Acceptor, &[Kind::Open, Kind::Fin, Kind::Data]),
            (Role::Acceptor, &[Kind::Open, Kind::Reset, Kind::Fin]),
            (Role::Opener, &[Kind::Open]),
            (Role::Opener, &[Kind::Data]),
            (Role::Opener, &[Kind::Fin]),
            (Role::Opener, &[Kind::Accept, Kind::Refuse]),
            (Role::Opener, &[Kind::Refuse, Kind::Data]),
            (Role::Opener, &[Kind::Accept, Kind::Fin, Kind::Reset]),
        ];
        for (role, frames) in cases {
            let mut exchange = Exchange::new(role);
            let (last, before) = frames.split_last().expect("frames");
            for kind in before {
                exchange.received(*kind).expect("legal");
            }
            exchange.received(*last).expect_err("out of turn");
        }
    }
}
