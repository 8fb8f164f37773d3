//! Rows into their stored form.

use std::path::PathBuf;

use half::f16;
use numpy::{
    Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use whence_core::error::Error;
use whence_core::store::{self, Part, Stored, blocks};

use crate::boundary::{compute, compute_alone, exception, not_contiguous, values_of};
use crate::sketch::rows_of;

/// Unit rows and scales, into memory of the caller's; see [`store::encode_into`].
#[pyfunction]
pub(crate) fn encode<'py>(
    py: Python<'py>,
    rows: PyReadonlyArray2<'py, f32>,
    stored: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    if let Ok(stored) = stored.cast::<PyArray2<f16>>() {
        return encode_rows(py, &rows, stored);
    }
    encode_rows(py, &rows, stored.cast::<PyArray2<f32>>()?)
}

fn encode_rows<'py, T: Stored + Element>(
    py: Python<'py>,
    rows: &PyReadonlyArray2<'py, f32>,
    stored: &Bound<'py, PyArray2<T>>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let dim = rows.shape()[1];
    if stored.shape() != rows.shape() || !stored.is_c_contiguous() {
        let must = format!("C-contiguous, of shape {:?}", rows.shape());
        return Err(exception(py, &Error::shape("stored", must, format!("{:?}", stored.shape()))));
    }
    let rows = values_of(py, "rows", rows)?;
    let refused = |error| exception(py, &Error::argument("stored", "writeable", error));
    let mut stored = stored.try_readwrite().map_err(refused)?;
    let stored = stored.as_slice_mut().map_err(|_| not_contiguous(py, "stored"))?;
    let scales = compute_alone(py, |watch| store::encode_into(rows, dim, stored, watch))?;
    Ok(scales.into_pyarray(py))
}

type Numbers<'py> = Bound<'py, PyArray1<f32>>;

/// Codes of few bits, scales and errors; see [`store::quantise`].
#[pyfunction]
pub(crate) fn quantise<'py>(
    py: Python<'py>,
    rows: PyReadonlyArray2<'py, f32>,
    bits: usize,
) -> PyResult<(Bound<'py, PyAny>, Numbers<'py>, Numbers<'py>)> {
    let [count, dim] = [rows.shape()[0], rows.shape()[1]];
    let rows = values_of(py, "rows", &rows)?;
    let made = compute_alone(py, |watch| store::quantise(rows, dim, bits, watch))?;
    let width = (dim * bits).div_ceil(8);
    let packed = if bits == 8 {
        let levels: Vec<i8> = made.packed.into_iter().map(u8::cast_signed).collect();
        levels.into_pyarray(py).reshape([count, width])?.into_any()
    } else {
        made.packed.into_pyarray(py).reshape([count, width])?.into_any()
    };
    Ok((packed, made.scales.into_pyarray(py), made.errors.into_pyarray(py)))
}

type Side<'py> = PyReadonlyArray2<'py, f32>;

/// Rows of factors and the norms of their gradients; see [`store::encode_factors`].
#[pyfunction]
pub(crate) fn encode_factors<'py>(
    py: Python<'py>,
    parts: Vec<(Option<Side<'py>>, Side<'py>, [bool; 2])>,
    half: bool,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<f32>>)> {
    let Some(batch) = parts.first().map(|part| part.1.shape()[0]) else {
        return Err(exception(py, &Error::shape("parts", "at least one", 0)));
    };
    let mut sides = Vec::with_capacity(parts.len());
    for (left, right, ones) in &parts {
        let left = left.as_ref().map(|left| rows_of(py, left)).transpose()?;
        sides.push(Part { left, right: rows_of(py, right)?, ones: *ones });
    }
    if half { factors::<f16>(py, &sides, batch) } else { factors::<f32>(py, &sides, batch) }
}

fn factors<'py, T: Stored + Element>(
    py: Python<'py>,
    parts: &[Part<'_>],
    batch: usize,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<f32>>)> {
    let (stored, norms) =
        compute_alone(py, |watch| store::encode_factors::<T>(parts, batch, watch))?;
    let width = stored.len().checked_div(batch).unwrap_or(0);
    let stored: Bound<'py, PyArray2<T>> = stored.into_pyarray(py).reshape([batch, width])?;
    Ok((stored.into_any(), norms.into_pyarray(py)))
}

/// The CRC-32 of bytes that follow others.
#[pyfunction]
pub(crate) fn crc32(py: Python<'_>, bytes: PyReadonlyArray1<'_, u8>, before: u32) -> PyResult<u32> {
    let bytes = values_of(py, "bytes", &bytes)?;
    compute_alone(py, |watch| store::crc32(before, bytes, watch))
}

/// The CRC-32 of each block of bytes; see [`blocks::checksums`].
#[pyfunction]
pub(crate) fn block_checksums<'py>(
    py: Python<'py>,
    bytes: PyReadonlyArray1<'py, u8>,
) -> PyResult<Bound<'py, PyArray1<u32>>> {
    let bytes = values_of(py, "bytes", &bytes)?;
    Ok(compute_alone(py, |watch| blocks::checksums(bytes, watch))?.into_pyarray(py))
}

/// The blocks of a file that have other checksums; see [`blocks::check_file`].
#[pyfunction]
pub(crate) fn check_file(
    py: Python<'_>,
    path: PathBuf,
    length: u64,
    checksums: PyReadonlyArray1<'_, u32>,
    threads: usize,
) -> PyResult<Vec<u64>> {
    let checksums = values_of(py, "checksums", &checksums)?;
    compute(py, |asker| blocks::check_file(&path, length, checksums, threads, asker))
}
