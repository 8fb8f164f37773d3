//! The one error type of the core. Messages read "ARGUMENT must BE, got WHAT".

use std::fmt;
use std::path::PathBuf;

/// Why a call did not do its work.
#[derive(Debug)]
pub enum Error {
    /// A number is outside what the argument allows.
    Argument {
        /// The argument as the caller wrote it.
        argument: &'static str,
        /// What it must be.
        must: String,
        /// What came.
        got: String,
    },
    /// An array has another shape than its neighbours ask for.
    Shape {
        /// The argument as the caller wrote it.
        argument: &'static str,
        /// What it must be.
        must: String,
        /// What came.
        got: String,
    },
    /// A value is NaN or infinite.
    NotFinite {
        /// The argument as the caller wrote it.
        argument: &'static str,
        /// Where in the argument the value stands.
        place: String,
        /// The value.
        value: f64,
    },
    /// A file could not be read or written.
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of a store is no more.
    Gone {
        /// The file.
        path: PathBuf,
    },
    /// A file does not hold what its manifest says.
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The caller asked the work to stop.
    Stopped,
    /// A worker thread panicked: a defect of this library.
    Internal(String),
}

impl Error {
    /// An [`Error::Argument`].
    pub fn argument(
        argument: &'static str,
        must: impl Into<String>,
        got: impl fmt::Display,
    ) -> Self {
        Self::Argument { argument, must: must.into(), got: got.to_string() }
    }

    /// The [`Error::Internal`] of what a worker thread left behind that panicked.
    #[must_use]
    pub fn panicked<T>(_: T) -> Self {
        Self::Internal("a worker thread panicked".into())
    }

    /// An [`Error::Shape`].
    pub fn shape(argument: &'static str, must: impl Into<String>, got: impl fmt::Display) -> Self {
        Self::Shape { argument, must: must.into(), got: got.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument { argument, must, got } | Self::Shape { argument, must, got } => {
                write!(formatter, "{argument} must be {must}, got {got}")
            }
            Self::NotFinite { argument, place, value } => {
                write!(formatter, "{argument} must be finite, got {value} at {place}")
            }
            Self::Io { path, source } => write!(formatter, "{}: {source}", path.display()),
            Self::Gone { path } => write!(
                formatter,
                "{} is gone: the store was compacted or repaired since it was opened (open it \
                 again), or is damaged",
                path.display()
            ),
            Self::Damaged { path, what } => {
                write!(formatter, "{} is damaged: {what}", path.display())
            }
            Self::Stopped => write!(formatter, "stopped by the caller"),
            Self::Internal(what) => write!(formatter, "internal error: {what}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
