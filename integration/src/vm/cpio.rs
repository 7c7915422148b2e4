//! The archive format of an initramfs: cpio, "newc", uncompressed (decompressing would cost an emulated guest seconds).

use std::io::{self, Write};

/// What a file is, as `st_mode` says it.
const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Writes an archive. Archives may follow each other in one initramfs.
#[derive(Debug)]
pub(super) struct Archive<W> {
    out: W,
    written: usize,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty one.
    pub(super) fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0 }
    }

    /// Adds a directory. Those above it must be there.
    pub(super) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY, (0, 0), &[])
    }

    /// Adds a file with these permissions.
    pub(super) fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.entry(path, REGULAR | permissions, (0, 0), content)
    }

    /// Adds a character device: the kernel opens /dev/console before anything can be mounted.
    pub(super) fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[])
    }

    /// Ends the archive, so that another one may follow: whom it was written to.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        let size = u32::try_from(content.len()).map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, path))?;
        self.inode += 1;
        // Magic, inode, mode, uid, gid, links, mtime, size, major, minor, device's major, device's minor, length of the
        // name with its NUL, checksum (none in this format).
        let name_size = path.len() as u32 + 1;
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut header = b"070701".to_vec();
        for field in fields {
            header.extend(format!("{field:08x}").bytes());
        }
        header.extend(path.bytes());
        header.push(0);
        self.padded(&header)?;
        self.padded(content)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len();
        let padding = self.written.next_multiple_of(4) - self.written;
        self.written += padding;
        self.out.write_all(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_sized_as_the_format_says() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("bin").expect("directory");
        archive.file("/bin/x", 0o755, b"12345").expect("file");
        let bytes = archive.finish().expect("finish");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        // The directory's header (110 bytes) and name (4) end at 114, padded to 116.
        assert!(text[116..].starts_with("070701"), "{text}");
        assert!(text.contains("000081ed"), "a regular file with permissions 755: {text}");
        assert!(text.contains("bin/x\0"), "{text}");
        assert!(text.contains("TRAILER!!!\0"), "{text}");
    }
}
