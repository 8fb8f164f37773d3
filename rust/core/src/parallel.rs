//! Work shared among threads that live for one call.
//!
//! Threads are started for the call and joined before it returns: nothing survives it, so a
//! process that forks after a call has no pool to lose, and no lock can be held across the fork.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use crate::error::Error;
use crate::stop::{Asker, Stop, Watch};

/// The most threads a call starts, whatever it was asked for.
pub const MAX_THREADS: usize = 256;

/// How long the calling thread sleeps, at most, while it waits for the others.
const LOOK: Duration = Duration::from_millis(20);

/// Lets the others stop where one panics.
struct StopOnPanic<'a>(&'a Stop);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.raise();
        }
    }
}

/// Does the `jobs` in any order on up to `threads` threads, each with a state of its own, and
/// returns the states of all threads.
///
/// The calling thread takes part, and asks `asker` between jobs and while it waits for others; a
/// job of more than milliseconds checks its [`Watch`] now and then. Which thread does which job is
/// not fixed: `work` must give the same result for any sharing-out.
///
/// # Errors
/// The first error a job returned, [`Error::Stopped`] if `asker` said so, [`Error::Internal`] if
/// a worker panicked.
pub fn share<S: Send>(
    jobs: usize,
    threads: usize,
    asker: &Asker<'_>,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize, &Watch<'_>) -> Result<(), Error> + Sync,
) -> Result<Vec<S>, Error> {
    let stop = Stop::new();
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let fail = |error| {
        if let Ok(mut first) = failure.lock() {
            first.get_or_insert(error);
        }
        stop.raise(); // after it: others that end because of this are not what went wrong
    };
    let run = |ask: Option<&Asker<'_>>| {
        let _guard = StopOnPanic(&stop);
        let mut mine = state();
        let watch = Watch::new(&stop, ask);
        loop {
            let job = next.fetch_add(1, Ordering::Relaxed);
            if job >= jobs {
                return mine;
            }
            if let Err(error) = watch.check().and_then(|()| work(&mut mine, job, &watch)) {
                fail(error);
                return mine;
            }
        }
    };
    let (caller, running) = (thread::current(), AtomicUsize::new(0));
    let workers = threads.clamp(1, MAX_THREADS).min(jobs.max(1)) - 1;
    let states = thread::scope(|scope| {
        let behind = || {
            running.fetch_add(1, Ordering::Relaxed);
            let mine = run(None);
            running.fetch_sub(1, Ordering::Release);
            caller.unpark();
            mine
        };
        // A system that will start no more threads slows the work down; it does not end it.
        let start = |_| thread::Builder::new().spawn_scoped(scope, behind).ok();
        let others: Vec<_> = (0..workers).map_while(start).collect();
        let mut states = vec![run(Some(asker))];
        let watch = Watch::new(&stop, Some(asker));
        // One that has not begun yet finds no job; one that panicked is finished.
        while running.load(Ordering::Acquire) > 0
            && !others.iter().all(ScopedJoinHandle::is_finished)
        {
            if let Err(error) = watch.check() {
                fail(error);
            }
            thread::park_timeout(LOOK);
        }
        for other in others {
            match other.join() {
                Ok(theirs) => states.push(theirs),
                Err(panic) => return Err(Error::panicked(panic)),
            }
        }
        Ok(states)
    })?;
    match failure.into_inner() {
        Ok(Some(error)) => Err(error),
        _ => Ok(states),
    }
}

/// What `work` makes of each of the `jobs`, in their order; else as [`share`].
///
/// # Errors
/// As [`share`].
pub fn collect<S: Send, T: Send>(
    jobs: usize,
    threads: usize,
    asker: &Asker<'_>,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize, &Watch<'_>) -> Result<T, Error> + Sync,
) -> Result<Vec<T>, Error> {
    let parts = share(
        jobs,
        threads,
        asker,
        || (state(), Vec::new()),
        |(state, made), job, watch| {
            made.push((job, work(state, job, watch)?));
            Ok(())
        },
    )?;
    let mut all: Vec<_> = parts.into_iter().flat_map(|(_, made)| made).collect();
    all.sort_unstable_by_key(|(job, _)| *job);
    Ok(all.into_iter().map(|(_, thing)| thing).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::time::Instant;

    use super::*;
    use crate::stop::never;

    #[test]
    fn every_job_is_done_once() {
        for threads in [0, 1, 3, 8] {
            let asker = Asker::new(&never);
            let states = share(100, threads, &asker, Vec::new, |done: &mut Vec<usize>, job, _| {
                done.push(job);
                Ok(())
            })
            .unwrap();
            let mut all: Vec<usize> = states.concat();
            all.sort_unstable();
            assert_eq!(all, (0..100).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_is_made_comes_in_the_order_of_the_jobs() {
        for threads in [1, 3, 8] {
            let asker = Asker::new(&never);
            let made = collect(
                50,
                threads,
                &asker,
                || 0,
                |count, job, _| {
                    *count += 1;
                    Ok(job * job)
                },
            );
            assert_eq!(made.unwrap(), (0..50).map(|job| job * job).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_error_ends_the_call() {
        let asker = Asker::new(&never);
        let found = share(
            100,
            2,
            &asker,
            || (),
            |(), job, _| {
                if job == 7 { Err(Error::argument("job", "another", job)) } else { Ok(()) }
            },
        );
        assert!(matches!(found, Err(Error::Argument { .. })));
    }

    #[test]
    fn a_yes_to_the_question_stops_the_work() {
        let yes = || true;
        let asker = Asker::new(&yes);
        let found = share(usize::MAX, 2, &asker, || (), |(), _, _| Ok(()));
        assert!(matches!(found, Err(Error::Stopped)));
    }

    #[test]
    fn a_caller_who_is_done_still_asks_while_another_works() {
        let (yes, caller, both) = (|| true, thread::current().id(), Barrier::new(2));
        let begun = Instant::now();
        let found = share(
            2,
            2,
            &Asker::new(&yes),
            || (),
            |(), _, watch| {
                both.wait(); // so that each thread has one job
                while thread::current().id() != caller && begun.elapsed() < Duration::from_secs(20)
                {
                    watch.check()?;
                    thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            },
        );
        assert!(matches!(found, Err(Error::Stopped)));
    }

    #[test]
    fn a_worker_that_panics_ends_the_call() {
        let caller = thread::current().id();
        let both = Barrier::new(2);
        let found = share(
            2,
            2,
            &Asker::new(&never),
            || (),
            |(), _, _| {
                both.wait();
                assert!(thread::current().id() == caller, "on purpose");
                Ok(())
            },
        );
        assert!(matches!(found, Err(Error::Internal(_))));
    }

    #[test]
    fn the_others_stop_where_one_panics() {
        let caller = thread::current().id();
        let (begun, done) = (Barrier::new(2), AtomicUsize::new(0));
        let found = share(
            4000,
            2,
            &Asker::new(&never),
            || false,
            |waited, _, _| {
                if !*waited {
                    *waited = true;
                    begun.wait();
                }
                assert!(thread::current().id() == caller, "on purpose");
                thread::sleep(Duration::from_millis(2));
                done.fetch_add(1, Ordering::Relaxed);
                Ok(())
            },
        );
        assert!(matches!(found, Err(Error::Internal(_))));
        assert!(done.into_inner() < 2000);
    }
}
