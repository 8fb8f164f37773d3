//! Files, read by position.

use std::fs::{File, Metadata};
use std::io::{self, ErrorKind};
use std::path::Path;

use crate::error::Error;
use crate::stop::Watch;

/// Bytes that are read between two looks at the watch.
const STEP: usize = 1 << 20;

/// Opens a regular file to read, and gives its length. Pipes and devices are refused before they are
/// read, as they may never end; and links, unless they are to be followed, as they may lead to any
/// file.
///
/// # Errors
/// [`Error::Damaged`] if something else is there, [`Error::Gone`] if nothing is where no link is
/// followed, [`Error::Io`].
pub(super) fn open(path: &Path, follow: bool) -> Result<(File, u64), Error> {
    // Looked at before it is opened, as opening a device may do something, and again after, as it
    // may have been exchanged in between: the flags keep that from following and from waiting.
    let io = |source: io::Error| match source.kind() {
        ErrorKind::NotFound if !follow => Error::Gone { path: path.to_owned() },
        _ => io_error(path, source),
    };
    let look = if follow { Path::metadata } else { Path::symlink_metadata };
    check_regular(path, &look(path).map_err(io)?)?;
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(
        &mut options,
        libc::O_NONBLOCK | if follow { 0 } else { libc::O_NOFOLLOW },
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

/// Fills `bytes` from byte `at` of a file on, some at a time: a disk may be slow.
///
/// # Errors
/// [`Error::Damaged`] if the file ends before, [`Error::Io`], [`Error::Stopped`].
pub(super) fn read_at(
    file: &File,
    path: &Path,
    bytes: &mut [u8],
    at: u64,
    watch: &Watch<'_>,
) -> Result<(), Error> {
    for (bytes, at) in bytes.chunks_mut(STEP).zip((at..).step_by(STEP)) {
        watch.check()?;
        read_exact_at(file, bytes, at).map_err(|source| {
            if source.kind() == ErrorKind::UnexpectedEof {
                let end = at.saturating_add(bytes.len() as u64);
                damaged(path, format!("it must have {end} bytes, and ends before"))
            } else {
                io_error(path, source)
            }
        })?;
    }
    Ok(())
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
        for follow in [false, true] {
            assert_eq!(open(&plain, follow).unwrap().1, 7);
            assert_eq!(open(&link, follow).is_ok(), follow);
            for other in [&pipe, &socket, &folder, Path::new("/dev/zero")] {
                let found = open(other, follow);
                assert!(matches!(found, Err(Error::Damaged { .. })), "{}", other.display());
            }
            let nothing = open(&folder.join("nothing"), follow);
            assert!(match nothing {
                Err(Error::Io { .. }) => follow,
                Err(Error::Gone { .. }) => !follow,
                _ => false,
            });
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
