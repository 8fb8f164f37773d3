//! Hostile input by the count, `WHENCE_INPUTS` of them, from number `WHENCE_FIRST` on: each is made
//! by its number alone, so that one that fails can be tried again.
#![allow(unsafe_code)] // the allocator that counts

mod hostile;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use whence_core::random;

/// Bytes that an input may have allocated beside twice its own size.
const ROOM: usize = 64 << 20;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, and how much of it is in use.
struct Counting;

impl Counting {
    fn add(size: usize) {
        let live = LIVE.fetch_add(size, Ordering::Relaxed).wrapping_add(size);
        MOST.fetch_max(live, Ordering::Relaxed);
    }

    fn remove(size: usize) {
        LIVE.fetch_sub(size, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::add(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        Self::remove(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both are there for a moment.
        Self::add(size);
        Self::remove(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn number_of(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// The bytes of input `number`.
fn input(number: u64) -> Vec<u8> {
    let key = random::parameter_key(number, "hostile", &[]);
    let length = random::value(key, 0) % 600;
    (1..=length).map(|at| random::value(key, at) as u8).collect()
}

#[test]
fn whatever_is_in_the_files_is_refused_or_answered_within_bounds() {
    let first = number_of("WHENCE_FIRST", 0);
    let mut largest = 0;
    for number in first..first + number_of("WHENCE_INPUTS", 400) {
        let bytes = input(number);
        let before = LIVE.load(Ordering::Relaxed);
        MOST.store(before, Ordering::Relaxed);
        let tried = std::panic::catch_unwind(|| hostile::try_input(&bytes));
        assert!(tried.is_ok(), "input {number}");
        let took = MOST.load(Ordering::Relaxed) - before;
        assert!(took <= 2 * bytes.len() + ROOM, "input {number} took {took} bytes");
        largest = largest.max(took);
    }
    assert!(largest > 0); // it was counted
}
