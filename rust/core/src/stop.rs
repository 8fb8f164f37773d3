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

    /// Asks, if it is time to; whether the work should stop.
    fn says_stop(&self) -> bool {
        if self.last.get().elapsed() < INTERVAL {
            return false;
        }
        self.last.set(Instant::now());
        (self.ask)()
    }
}

/// What a worker looks at between pieces of work: the flag, and on the calling thread the asker.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    stop: Option<&'a Stop>,
    asker: Option<&'a Asker<'a>>,
}

impl<'a> Watch<'a> {
    /// The watch of a worker; `asker` on the calling thread only.
    #[must_use]
    pub fn new(stop: &'a Stop, asker: Option<&'a Asker<'a>>) -> Self {
        Self { stop: Some(stop), asker }
    }

    /// The watch of work that the calling thread does alone.
    #[must_use]
    pub fn of(asker: &'a Asker<'a>) -> Self {
        Self { stop: None, asker: Some(asker) }
    }

    /// The watch of work that nobody stops.
    #[must_use]
    pub const fn none() -> Self {
        Self { stop: None, asker: None }
    }

    /// To be called at least every few milliseconds of work; takes tens of nanoseconds.
    ///
    /// # Errors
    /// [`Error::Stopped`] if the work should end.
    pub fn check(&self) -> Result<(), Error> {
        if self.asker.is_some_and(Asker::says_stop) {
            if let Some(stop) = self.stop {
                stop.raise();
            }
            return Err(Error::Stopped);
        }
        self.stop.map_or(Ok(()), Stop::check)
    }

    /// A count of steps of about a nanosecond, for loops of so little work that a check would take
    /// longer.
    #[must_use]
    pub fn steps(&self) -> Steps<'a> {
        Steps { watch: *self, left: STEPS }
    }
}

/// Steps between two checks.
const STEPS: usize = 1 << 16;

/// What a loop counts its steps with.
pub struct Steps<'a> {
    watch: Watch<'a>,
    left: usize,
}

impl Steps<'_> {
    /// Counts so many steps, and checks if there were many since the last time.
    ///
    /// # Errors
    /// As [`Watch::check`].
    #[inline]
    pub fn add(&mut self, steps: usize) -> Result<(), Error> {
        if steps < self.left {
            self.left -= steps;
            return Ok(());
        }
        self.left = STEPS;
        self.watch.check()
    }
}

/// The question of a caller who never stops the work.
#[must_use]
pub fn never() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_yes_ends_work_at_the_next_check_and_that_of_other_workers() {
        let yes = || true;
        let asker = Asker::new(&yes);
        let stop = Stop::new();
        let (mine, other) = (Watch::new(&stop, Some(&asker)), Watch::new(&stop, None));
        assert!(mine.check().is_ok() && other.check().is_ok());
        std::thread::sleep(INTERVAL);
        assert!(other.check().is_ok());
        assert!(matches!(mine.check(), Err(Error::Stopped)));
        assert!(matches!(other.check(), Err(Error::Stopped)));
        assert!(Watch::none().check().is_ok());
    }

    #[test]
    fn steps_check_once_in_so_many_however_they_are_counted() {
        let yes = || true;
        for size in [1, 7, STEPS, usize::MAX] {
            let asker = Asker::new(&yes);
            std::thread::sleep(INTERVAL);
            let watch = Watch::of(&asker);
            let mut steps = watch.steps();
            let done = (0..=STEPS).take_while(|_| steps.add(size).is_ok()).count();
            assert_eq!(done, STEPS.div_ceil(size) - 1);
        }
    }
}
