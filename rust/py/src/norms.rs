//! `whence._core.norm_gradients`.

use numpy::{IntoPyArray, PyArray2, PyArrayMethods, PyReadonlyArray3, PyUntypedArrayMethods};
use pyo3::prelude::*;
use whence_core::norms;

use crate::boundary::{compute, values_of};

type Pair<'py> = (Bound<'py, PyArray2<f32>>, Bound<'py, PyArray2<f32>>);

/// The per-sample gradients of a norm layer's weight and bias, `[batch, width]` each.
#[pyfunction]
pub(crate) fn norm_gradients<'py>(
    py: Python<'py>,
    values: PyReadonlyArray3<'_, f32>,
    delta: PyReadonlyArray3<'_, f32>,
    epsilon: f32,
    centred: bool,
    threads: usize,
) -> PyResult<Pair<'py>> {
    let (batch, width) = (values.shape()[0], values.shape()[2]);
    let values = values_of(py, "values", &values)?;
    let delta = values_of(py, "delta", &delta)?;
    let [weight, bias] = compute(py, |asker| {
        norms::gradients(values, delta, batch, width, epsilon, centred, threads, asker)
    })?;
    let shape = [batch, width];
    Ok((weight.into_pyarray(py).reshape(shape)?, bias.into_pyarray(py).reshape(shape)?))
}
