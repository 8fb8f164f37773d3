//! `whence._core.Sketch`.

use half::{bf16, f16};
use numpy::ndarray::{ArrayView3, Axis};
use numpy::{
    Element, IntoPyArray, PyArray1, PyReadonlyArray2, PyReadonlyArray3, PyReadwriteArray2,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use whence_core::error::Error;
use whence_core::kernels::InstructionSet;
use whence_core::sketch::{self, Kind, Matrix, Sequences, Totals, Value};
use whence_core::stop::Watch;

use crate::boundary::{compute, compute_alone, exception, not_contiguous, values_of};

#[pyclass(frozen, module = "whence._core")]
pub(crate) struct Sketch(sketch::Sketch);

type Slots<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<u16>>);

#[pymethods]
impl Sketch {
    #[new]
    #[pyo3(signature = (kind, dim, seed, nonzeros=1))]
    fn new(py: Python<'_>, kind: &str, dim: usize, seed: u64, nonzeros: usize) -> PyResult<Self> {
        let sketch =
            Kind::named(kind, nonzeros).and_then(|kind| sketch::Sketch::new(kind, dim, seed));
        sketch.map(Self).map_err(|error| exception(py, &error))
    }

    #[getter]
    fn dim(&self) -> usize {
        self.0.dim()
    }

    #[pyo3(signature = (name, shape, start, values, totals, threads, first=0, *, bfloat16=false))]
    fn add_flat(
        &self,
        py: Python<'_>,
        name: &str,
        shape: Vec<u64>,
        start: u64,
        values: &Bound<'_, PyAny>,
        mut totals: PyReadwriteArray2<'_, f64>,
        threads: usize,
        first: usize,
        bfloat16: bool,
    ) -> PyResult<Vec<usize>> {
        let parameter = self.parameter(py, name, &shape)?;
        let totals = columns(py, &mut totals, first)?;
        if bfloat16 {
            let bits: PyReadonlyArray2<'_, u16> = values.extract()?;
            let rows = rows_of(py, &bits)?;
            let rows: Vec<&[bf16]> =
                rows.into_iter().map(half::slice::HalfBitsSliceExt::reinterpret_cast).collect();
            self.flat(py, parameter, start, &rows, totals, threads)
        } else if let Ok(values) = values.extract::<PyReadonlyArray2<'_, f32>>() {
            self.flat(py, parameter, start, &rows_of(py, &values)?, totals, threads)
        } else {
            let values: PyReadonlyArray2<'_, f16> = values.extract()?;
            self.flat(py, parameter, start, &rows_of(py, &values)?, totals, threads)
        }
    }

    #[pyo3(signature = (name, shape, start, left, right, totals, threads, first=0, sum=None, bias=None))]
    fn add_outer(
        &self,
        py: Python<'_>,
        name: &str,
        shape: Vec<u64>,
        start: u64,
        left: PyReadonlyArray3<'_, f32>,
        right: PyReadonlyArray3<'_, f32>,
        mut totals: PyReadwriteArray2<'_, f64>,
        threads: usize,
        first: usize,
        sum: Option<PyReadwriteArray2<'_, f32>>,
        bias: Option<(String, Vec<u64>, u64)>,
    ) -> PyResult<Vec<usize>> {
        let parameter = self.parameter(py, name, &shape)?;
        let totals = columns(py, &mut totals, first)?;
        let (left, right) = (left.as_array(), right.as_array());
        if left.shape()[..2] != right.shape()[..2] {
            let must = format!("[{}, {}, columns]", left.shape()[0], left.shape()[1]);
            let got = format!("{:?}", right.shape());
            return Err(exception(py, &Error::shape("right", must, got)));
        }
        let bias = match &bias {
            Some((name, shape, start)) => Some((self.parameter(py, name, shape)?, *start)),
            None => None,
        };
        let mut sum = sum;
        let sum = match &mut sum {
            Some(sum) => Some(sum.as_slice_mut().map_err(|_| not_contiguous(py, "sum"))?),
            None => None,
        };
        compute(py, |asker| {
            let watch = &Watch::of(asker);
            with_sequences("left", left, watch, |left| {
                with_sequences("right", right, watch, |right| {
                    self.0
                        .add_outer(parameter, start, left, right, totals, sum, bias, threads, asker)
                })
            })
        })
    }

    #[pyo3(signature = (name, shape, indices, values, ignored, totals, threads, first=0))]
    fn add_lookup(
        &self,
        py: Python<'_>,
        name: &str,
        shape: Vec<u64>,
        indices: PyReadonlyArray2<'_, i64>,
        values: PyReadonlyArray3<'_, f32>,
        ignored: Option<i64>,
        mut totals: PyReadwriteArray2<'_, f64>,
        threads: usize,
        first: usize,
    ) -> PyResult<Vec<usize>> {
        let parameter = self.parameter(py, name, &shape)?;
        let (batch, width) = (indices.shape()[0], values.shape()[2]);
        if values.shape()[..2] != *indices.shape() {
            let must = format!("[{batch}, {}, {width}]", indices.shape()[1]);
            let got = format!("{:?}", values.shape());
            return Err(exception(py, &Error::shape("values", must, got)));
        }
        let totals = columns(py, &mut totals, first)?;
        let indices = values_of(py, "indices", &indices)?;
        let values = values_of(py, "values", &values)?;
        compute(py, |asker| {
            self.0.add_lookup(
                parameter, indices, values, width, ignored, batch, totals, threads, asker,
            )
        })
    }

    fn key(&self, py: Python<'_>, name: &str, shape: Vec<u64>) -> PyResult<u64> {
        Ok(self.parameter(py, name, &shape)?.key())
    }

    fn slots<'py>(&self, py: Python<'py>, name: &str, shape: Vec<u64>) -> PyResult<Slots<'py>> {
        let parameter = self.parameter(py, name, &shape)?;
        let slots = compute_alone(py, |watch| self.0.slots(parameter, watch))?;
        let (offsets, signs): (Vec<u32>, Vec<u16>) =
            slots.iter().map(|slot| (slot.offset(), slot.signs())).unzip();
        Ok((offsets.into_pyarray(py), signs.into_pyarray(py)))
    }
}

impl Sketch {
    fn parameter(&self, py: Python<'_>, name: &str, shape: &[u64]) -> PyResult<sketch::Parameter> {
        self.0.parameter(name, shape).map_err(|error| exception(py, &error))
    }

    fn flat<T: Value + Send>(
        &self,
        py: Python<'_>,
        parameter: sketch::Parameter,
        start: u64,
        rows: &[&[T]],
        totals: Totals<'_>,
        threads: usize,
    ) -> PyResult<Vec<usize>> {
        compute(py, |asker| {
            self.0.add_flat(parameter, start, Matrix::new(rows)?, totals, threads, asker)
        })
    }
}

/// The columns from `first` on of an array of totals.
fn columns<'a>(
    py: Python<'_>,
    totals: &'a mut PyReadwriteArray2<'_, f64>,
    first: usize,
) -> PyResult<Totals<'a>> {
    let width = totals.shape()[1];
    let values = totals.as_slice_mut().map_err(|_| not_contiguous(py, "totals"))?;
    Ok(Totals::new(values, width, first))
}

/// The rows of an array, each of which must lie in one piece.
pub(crate) fn rows_of<'a, T: Element>(
    py: Python<'_>,
    values: &'a PyReadonlyArray2<'_, T>,
) -> PyResult<Vec<&'a [T]>> {
    let view = values.as_array();
    let rows = (0..view.nrows()).map(|row| view.index_axis_move(Axis(0), row).to_slice());
    rows.collect::<Option<_>>().ok_or_else(|| not_contiguous(py, "values"))
}

/// Calls `work` with the array as it lies, or with a copy of it if it lies backwards or with gaps.
///
/// A dimension along which the array repeats itself (stride 0, as `broadcast_to` makes) is taken
/// as one that is not there.
fn with_sequences<T>(
    argument: &'static str,
    array: ArrayView3<'_, f32>,
    watch: &Watch<'_>,
    work: impl FnOnce(Sequences<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let (a, b, c) = array.dim();
    let mut kept = array.reborrow();
    let mut strides = [0; 3];
    for (axis, stride) in strides.iter_mut().enumerate() {
        if array.strides()[axis] == 0 && array.shape()[axis] > 1 {
            kept.collapse_axis(Axis(axis), 0);
        } else {
            *stride = usize::try_from(array.strides()[axis]).unwrap_or(usize::MAX);
        }
    }
    match kept.as_slice_memory_order() {
        Some(values) if !strides.contains(&usize::MAX) => {
            work(Sequences::new(argument, values, [a, b, c], strides)?)
        }
        _ => {
            let mut steps = watch.steps();
            let value = |&value: &f32| steps.add(2).map(|()| value);
            let copy = array.iter().map(value).collect::<Result<Vec<f32>, Error>>()?;
            work(Sequences::new(argument, &copy, [a, b, c], [b * c, c, 1])?)
        }
    }
}

/// The instruction set the kernels use on this machine.
#[pyfunction]
pub(crate) fn instruction_set() -> &'static str {
    InstructionSet::best().name()
}
