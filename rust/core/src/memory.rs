//! Memory for large arrays.
//!
//! Where what is read next cannot be foreseen, as in a walk over a graph, finding the page of an
//! address takes as long as the read, unless pages are large. Linux makes them so for who asks.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::stop::Watch;

/// Values that are written between two looks at the watch.
const STEP: usize = 1 << 18;
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
///
/// # Errors
/// [`Error::Stopped`].
pub fn filled<T: Copy>(count: usize, value: T, watch: &Watch<'_>) -> Result<Vec<T>, Error> {
    fill(with_room(count), count, value, watch)
}

/// The same; none if there is no room for so many.
///
/// # Errors
/// [`Error::Stopped`].
pub fn try_filled<T: Copy>(
    count: usize,
    value: T,
    watch: &Watch<'_>,
) -> Result<Option<Vec<T>>, Error> {
    let mut values = Vec::new();
    if values.try_reserve_exact(count).is_err() {
        return Ok(None);
    }
    advise(&values);
    fill(values, count, value, watch).map(Some)
}

/// Memory that is touched for the first time takes long: the system clears it.
fn fill<T: Copy>(
    mut values: Vec<T>,
    count: usize,
    value: T,
    watch: &Watch<'_>,
) -> Result<Vec<T>, Error> {
    while values.len() < count {
        watch.check()?;
        values.resize(count.min(values.len() + STEP), value);
    }
    Ok(values)
}

/// A copy of values.
///
/// # Errors
/// [`Error::Stopped`].
pub fn copied<T: Copy>(values: &[T], watch: &Watch<'_>) -> Result<Vec<T>, Error> {
    joined(&[values], watch)
}

/// Copies of values, one after the other.
///
/// # Errors
/// [`Error::Stopped`].
pub fn joined<T: Copy>(parts: &[&[T]], watch: &Watch<'_>) -> Result<Vec<T>, Error> {
    let mut all = with_room(parts.iter().map(|part| part.len()).sum());
    for values in parts.iter().flat_map(|part| part.chunks(STEP)) {
        watch.check()?;
        all.extend_from_slice(values);
    }
    Ok(all)
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
            let watch = Watch::none();
            assert_eq!(filled(count, 7u64, &watch).unwrap(), vec![7; count]);
            assert_eq!(try_filled(count, 7u64, &watch).unwrap(), Some(vec![7; count]));
            let values: Vec<u64> = (0..count as u64).collect();
            assert_eq!(copied(&values, &watch).unwrap(), values);
            let (before, after) = values.split_at(count / 3);
            assert_eq!(joined(&[before, &[], after], &watch).unwrap(), values);
            assert!(with_room::<u64>(count).capacity() >= count);
        }
        for count in [1 << 50, usize::MAX] {
            assert_eq!(try_filled(count, 7u64, &Watch::none()).unwrap(), None);
        }
    }
}
