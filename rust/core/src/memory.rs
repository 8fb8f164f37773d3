//! Memory for large arrays.
//!
//! Where what is read next cannot be foreseen, as in a walk over a graph, finding the page of an
//! address takes as long as the read, unless pages are large. Linux makes them so for who asks.
#![allow(unsafe_code)]

/// From so many bytes on large pages are asked for: twice the size of one.
const LARGE: usize = 1 << 22;

/// An empty vector with room for `count` values.
#[must_use]
pub fn with_room<T>(count: usize) -> Vec<T> {
    let values = Vec::with_capacity(count);
    advise(&values);
    values
}

/// `count` times the same value.
#[must_use]
pub fn filled<T: Copy>(count: usize, value: T) -> Vec<T> {
    let mut values = with_room(count);
    values.resize(count, value);
    values
}

/// The same; none if there is no room for so many.
#[must_use]
pub fn try_filled<T: Copy>(count: usize, value: T) -> Option<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).ok()?;
    advise(&values);
    values.resize(count, value);
    Some(values)
}

/// A copy of values.
#[must_use]
pub fn copied<T: Copy>(values: &[T]) -> Vec<T> {
    let mut copy = with_room(values.len());
    copy.extend_from_slice(values);
    copy
}

/// Asks for large pages, before the first write makes small ones.
#[cfg(target_os = "linux")]
fn advise<T>(values: &Vec<T>) {
    let bytes = values.capacity() * size_of::<T>();
    if bytes < LARGE {
        return;
    }
    let start = values.as_ptr().addr();
    // Whole pages, of whatever size they are up to 64 KiB.
    let first = start.next_multiple_of(1 << 16);
    let last = (start + bytes) & !((1 << 16) - 1);
    let at = values.as_ptr().cast_mut().cast::<libc::c_void>().wrapping_byte_add(first - start);
    // SAFETY: the range lies in the vector's own memory, and the advice changes no content of it.
    // What the kernel answers does not matter: it is advice.
    unsafe {
        libc::madvise(at, last - first, libc::MADV_HUGEPAGE);
    }
}

#[cfg(not(target_os = "linux"))]
fn advise<T>(_: &Vec<T>) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_asked_for_however_many() {
        for count in [0, 1, 1000, LARGE / 8 - 1, LARGE / 8, LARGE / 4 + 12345] {
            assert_eq!(filled(count, 7u64), vec![7; count]);
            assert_eq!(try_filled(count, 7u64), Some(vec![7; count]));
            let values: Vec<u64> = (0..count as u64).collect();
            let copy = copied(&values);
            assert_eq!(copy, values);
            assert!(with_room::<u64>(count).capacity() >= count);
        }
        for count in [1 << 50, usize::MAX] {
            assert_eq!(try_filled(count, 7u64), None);
        }
    }
}
