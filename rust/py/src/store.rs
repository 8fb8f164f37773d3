//! Rows into their stored form.

use half::f16;
use numpy::{
    IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use whence_core::store;

use crate::boundary::{compute, not_contiguous};

#[pyfunction]
pub(crate) fn encode<'py>(
    py: Python<'py>,
    rows: PyReadonlyArray2<'py, f32>,
    half: bool,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<f32>>)> {
    let [count, dim] = [rows.shape()[0], rows.shape()[1]];
    let rows = rows.as_slice().map_err(|_| not_contiguous(py, "rows"))?;
    if half {
        let (stored, scales) = compute(py, |_| store::encode::<f16>(rows, dim))?;
        let stored: Bound<'py, PyArray2<f16>> = stored.into_pyarray(py).reshape([count, dim])?;
        Ok((stored.into_any(), scales.into_pyarray(py)))
    } else {
        let (stored, scales) = compute(py, |_| store::encode::<f32>(rows, dim))?;
        let stored: Bound<'py, PyArray2<f32>> = stored.into_pyarray(py).reshape([count, dim])?;
        Ok((stored.into_any(), scales.into_pyarray(py)))
    }
}
