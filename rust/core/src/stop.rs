//! How a long call learns that it should end.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::Error;

/// How long work may go on between two questions to the caller.
const INTERVAL: Duration = Duration::from_millis(50);

/// A flag that every worker reads, and a question that only the calling thread asks.
///
/// The question (in Python: has Ctrl-C been pressed?) may be asked from one thread only, so the
/// calling thread holds an [`Asker`] and the workers hold the flag.
pub struct Stop {
    flag: AtomicBool,
}

impl Stop {
    /// A flag that is down.
    #[must_use]
    pub const fn new() -> Self {
        Self { flag: AtomicBool::new(false) }
    }

    /// Raises the flag: all workers end at their next check.
    pub fn raise(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }

    /// Whether the work may go on.
    ///
    /// # Errors
    /// [`Error::Stopped`] once the flag is up.
    pub fn check(&self) -> Result<(), Error> {
        if self.flag.load(Ordering::Relaxed) { Err(Error::Stopped) } else { Ok(()) }
    }
}

impl Default for Stop {
    fn default() -> Self {
        Self::new()
    }
}

/// The calling thread's side of a [`Stop`]: asks its question every 50 ms of work.
pub struct Asker<'a> {
    ask: &'a dyn Fn() -> bool,
    last: Cell<Instant>,
}

impl<'a> Asker<'a> {
    /// An asker whose question answers `true` when the work should stop.
    pub fn new(ask: &'a dyn Fn() -> bool) -> Self {
        Self { ask, last: Cell::new(Instant::now()) }
    }

    /// Asks, if it is time to, and raises `stop` on a yes.
    pub fn tick(&self, stop: &Stop) {
        if self.last.get().elapsed() >= INTERVAL {
            self.last.set(Instant::now());
            if (self.ask)() {
                stop.raise();
            }
        }
    }
}

/// What a worker looks at between pieces of work: the flag, and on the calling thread the asker.
pub struct Watch<'a> {
    stop: &'a Stop,
    asker: Option<&'a Asker<'a>>,
}

impl<'a> Watch<'a> {
    /// The watch of a worker; `asker` on the calling thread only.
    #[must_use]
    pub fn new(stop: &'a Stop, asker: Option<&'a Asker<'a>>) -> Self {
        Self { stop, asker }
    }

    /// To be called at least every few milliseconds of work; takes tens of nanoseconds.
    ///
    /// # Errors
    /// [`Error::Stopped`] if the work should end.
    pub fn check(&self) -> Result<(), Error> {
        if let Some(asker) = self.asker {
            asker.tick(self.stop);
        }
        self.stop.check()
    }
}

/// The question of a caller who never stops the work.
#[must_use]
pub fn never() -> bool {
    false
}
