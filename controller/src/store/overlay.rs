//! A view of a file that can be written to without changing the file: what is written stays in memory.
//!
//! The database's integrity check repairs while it checks. Run through this view, it can say whether a store is sound,
//! and the key can be tried, before a single byte of the file is touched.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

const PAGE: u64 = 4096;

#[derive(Debug)]
pub(super) struct Overlay {
    file: File,
    file_length: u64,
    written: Mutex<Written>,
}

struct Written {
    length: u64,
    pages: HashMap<u64, Box<[u8; PAGE as usize]>>,
}

impl std::fmt::Debug for Written {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Written({} pages)", self.pages.len())
    }
}

impl Overlay {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let file_length = file.metadata()?.len();
        Ok(Self { file, file_length, written: Mutex::new(Written { length: file_length, pages: HashMap::new() }) })
    }

    /// Each write leaves the overlay whole, so one that panicked elsewhere has not harmed it.
    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file's part of a page; zeros behind its end.
    fn page_of_file(&self, number: u64) -> io::Result<Box<[u8; PAGE as usize]>> {
        let mut page = Box::new([0; PAGE as usize]);
        let start = number * PAGE;
        if start < self.file_length {
            let present = (self.file_length - start).min(PAGE) as usize;
            self.file.read_exact_at(&mut page[..present], start)?;
        }
        Ok(page)
    }
}

/// The pieces of `offset..offset + length` that each lie in one page: page, offset in the page, offset in the buffer, length.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < length).then(|| {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let piece = (length - done).min(PAGE as usize - within);
            let result = (at / PAGE, within, done, piece);
            done += piece;
            result
        })
    })
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.written().length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let written = self.written();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > written.length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (page, within, at, length) in pieces(offset, out.len()) {
            let target = &mut out[at..at + length];
            match written.pages.get(&page) {
                Some(bytes) => target.copy_from_slice(&bytes[within..within + length]),
                None => target.copy_from_slice(&self.page_of_file(page)?[within..within + length]),
            }
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut written = self.written();
        if length < written.length {
            // What lies behind the new end must read as zeros if the storage grows again.
            let number = length / PAGE;
            let within = (length % PAGE) as usize;
            let mut last = match written.pages.remove(&number) {
                Some(page) => page,
                None => self.page_of_file(number)?,
            };
            last[within..].fill(0);
            written.pages.retain(|page, _| *page < number);
            written.pages.insert(number, last);
            for page in number + 1..self.file_length.div_ceil(PAGE) {
                written.pages.insert(page, Box::new([0; PAGE as usize]));
            }
        }
        written.length = length;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut written = self.written();
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > written.length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (page, within, at, length) in pieces(offset, data.len()) {
            let mut bytes = match written.pages.remove(&page) {
                Some(bytes) => bytes,
                None => self.page_of_file(page)?,
            };
            bytes[within..within + length].copy_from_slice(&data[at..at + length]);
            written.pages.insert(page, bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Operation {
        Write(u64, Vec<u8>),
        SetLength(u64),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            3 => (0..20_000_u64, prop::collection::vec(any::<u8>(), 0..9000)).prop_map(|(at, data)| Operation::Write(at, data)),
            1 => (0..20_000_u64).prop_map(Operation::SetLength),
        ]
    }

    proptest! {
        #[test]
        fn it_behaves_like_memory_and_leaves_the_file_alone(
            content in prop::collection::vec(any::<u8>(), 0..12_000),
            operations in prop::collection::vec(operation(), 0..12),
        ) {
            let directory = tempfile::tempdir().expect("temporary directory");
            let path = directory.path().join("file");
            std::fs::write(&path, &content).expect("write");
            let overlay = Overlay::new(File::open(&path).expect("open")).expect("overlay");
            let mut model = content.clone();
            for operation in operations {
                match operation {
                    Operation::Write(at, data) => {
                        let fits = at as usize + data.len() <= model.len();
                        prop_assert_eq!(overlay.write(at, &data).is_ok(), fits);
                        if fits {
                            model[at as usize..at as usize + data.len()].copy_from_slice(&data);
                        }
                    }
                    Operation::SetLength(length) => {
                        overlay.set_len(length).expect("set_len");
                        model.resize(length as usize, 0);
                    }
                }
                let mut seen = vec![0; model.len()];
                overlay.read(0, &mut seen).expect("read");
                prop_assert_eq!(&seen, &model);
            }
            prop_assert_eq!(std::fs::read(&path).expect("read"), content);
        }
    }
}
