//! The one door: the GIL is released here, Ctrl-C answered, and errors become exceptions.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use numpy::ndarray::Dimension;
use numpy::{Element, PyReadonlyArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyModule;
use whence_core::error::Error;
use whence_core::memory;
use whence_core::stop::{Asker, Watch};

/// Runs `work` without the GIL. Every 50 ms of it signals are looked at, and a pending exception,
/// such as that of Ctrl-C, ends it.
pub(crate) fn compute<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&Asker<'_>) -> Result<T, Error> + Send,
) -> PyResult<T> {
    let (result, pending) = py.detach(|| {
        let pending = RefCell::new(None);
        // A closure, though clippy would like the bare method: that one has a fixed lifetime.
        #[allow(clippy::redundant_closure_for_method_calls)]
        let ask = || match Python::try_attach(|py| py.check_signals()) {
            Some(Err(error)) => {
                pending.replace(Some(error));
                true
            }
            _ => false,
        };
        let result = catch_unwind(AssertUnwindSafe(|| work(&Asker::new(&ask))));
        let result = result.unwrap_or_else(|_| Err(Error::Internal("a kernel panicked".into())));
        (result, pending.take())
    });
    match pending {
        Some(error) => Err(error),
        None => result.map_err(|error| exception(py, &error)),
    }
}

/// The same for work that the calling thread does alone.
pub(crate) fn compute_alone<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&Watch<'_>) -> Result<T, Error> + Send,
) -> PyResult<T> {
    compute(py, |asker| work(&Watch::of(asker)))
}

/// The exception of `whence.errors` that stands for `error`.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Argument { .. } => "ArgumentError",
        Error::Shape { .. } => "ShapeError",
        Error::NotFinite { .. } => "NotFiniteError",
        Error::Io { .. } | Error::Gone { .. } | Error::Damaged { .. } => "StoreError",
        Error::Stopped | Error::Internal(_) => "WhenceError",
    };
    let made = PyModule::import(py, "whence.errors")
        .and_then(|module| module.getattr(class))
        .and_then(|class| class.call1((error.to_string(),)));
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}

/// The values of an array that lies row by row.
pub(crate) fn values_of<'a, T: Element, D: Dimension>(
    py: Python<'_>,
    argument: &'static str,
    array: &'a PyReadonlyArray<'_, T, D>,
) -> PyResult<&'a [T]> {
    // One that lies column by column would be a slice too.
    let values = array.is_c_contiguous().then(|| array.as_slice().ok()).flatten();
    values.ok_or_else(|| not_contiguous(py, argument))
}

/// A copy of them.
pub(crate) fn copied<T: Element + Copy + Send + Sync, D: Dimension>(
    py: Python<'_>,
    argument: &'static str,
    array: &PyReadonlyArray<'_, T, D>,
) -> PyResult<Vec<T>> {
    let values = values_of(py, argument, array)?;
    compute_alone(py, |watch| memory::copied(values, watch))
}

/// The values of an array that lies row by row; no values of no array.
pub(crate) fn values_if_any<'a, T: Element, D: Dimension>(
    py: Python<'_>,
    argument: &'static str,
    array: Option<&'a PyReadonlyArray<'_, T, D>>,
) -> PyResult<&'a [T]> {
    array.map_or(Ok(&[]), |array| values_of(py, argument, array))
}

/// A [`Error::Shape`] about an array that is not laid out row by row.
pub(crate) fn not_contiguous(py: Python<'_>, argument: &'static str) -> PyErr {
    exception(py, &Error::shape(argument, "C-contiguous", "an array with other strides"))
}
