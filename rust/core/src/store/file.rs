//! Files, read by position.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::path::Path;

use crate::error::Error;

/// Opens a file to read; a link leads to what it names.
pub(super) fn open(path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| io_error(path, source))
}

/// Opens a regular file to read, and gives its length. What a store does not write is refused
/// before it is read: a link may name any file, and a pipe or a device may never end.
///
/// # Errors
/// [`Error::Damaged`] if something else is there, [`Error::Io`].
pub(super) fn open_regular(path: &Path) -> Result<(File, u64), Error> {
    // Looked at before it is opened, as opening a device may do something, and again after, as it
    // may have been exchanged in between: the flags keep that from following and from waiting.
    let io = |source| io_error(path, source);
    check_regular(path, &path.symlink_metadata().map_err(io)?)?;
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        libc::O_NOFOLLOW | libc::O_NONBLOCK,
    );
    let file = options.open(path).map_err(io)?;
    let found = file.metadata().map_err(io)?;
    check_regular(path, &found)?;
    Ok((file, found.len()))
}

fn check_regular(path: &Path, found: &Metadata) -> Result<(), Error> {
    if found.is_file() {
        return Ok(());
    }
    let kind = if found.is_symlink() {
        "a link"
    } else if found.is_dir() {
        "a folder"
    } else {
        "a pipe, socket or device"
    };
    Err(damaged(path, format!("it must be a regular file, got {kind}")))
}

/// Fills `bytes` from byte `at` of a file on.
///
/// # Errors
/// [`Error::Damaged`] if the file ends before, [`Error::Io`].
pub(super) fn read_at(file: &File, path: &Path, bytes: &mut [u8], at: u64) -> Result<(), Error> {
    read_exact_at(file, bytes, at).map_err(|source| {
        if source.kind() == ErrorKind::UnexpectedEof {
            let end = at.saturating_add(bytes.len() as u64);
            damaged(path, format!("it must have {end} bytes, and ends before"))
        } else {
            io_error(path, source)
        }
    })
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, bytes, at)?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[read..];
        at += read as u64;
    }
    Ok(())
}

/// An [`Error::Io`].
pub(super) fn io_error(path: &Path, source: io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}

/// An [`Error::Damaged`].
pub(super) fn damaged(path: &Path, what: String) -> Error {
    Error::Damaged { path: path.to_owned(), what }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_regular_file_is_opened() {
        let folder = std::env::temp_dir().join(format!("whence-regular-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let [plain, link, pipe, socket] =
            ["plain", "link", "pipe", "socket"].map(|name| folder.join(name));
        std::fs::write(&plain, b"content").unwrap();
        symlink(&plain, &link).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        drop(UnixListener::bind(&socket).unwrap());
        assert_eq!(open_regular(&plain).unwrap().1, 7);
        for other in [&link, &pipe, &socket, &folder, Path::new("/dev/zero")] {
            let found = open_regular(other);
            assert!(matches!(found, Err(Error::Damaged { .. })), "{}", other.display());
        }
        let found = open_regular(&folder.join("nothing"));
        assert!(matches!(found, Err(Error::Io { .. })));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
