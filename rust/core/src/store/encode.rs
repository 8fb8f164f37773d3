//! Rows to unit rows and scales.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::stop::Watch;

/// A type that stored rows have.
pub trait Stored: Copy + Default + Send + Sync {
    /// The nearest stored value; ties to even.
    fn round(value: f64) -> Self;
    /// The nearest stored values of a row times `factor`.
    fn round_all(row: &[f32], factor: f64, stored: &mut [Self]);
}

impl Stored for f32 {
    fn round(value: f64) -> Self {
        value as f32
    }
    fn round_all(row: &[f32], factor: f64, stored: &mut [Self]) {
        InstructionSet::best().multiply(row, factor, stored);
    }
}

impl Stored for f16 {
    fn round(value: f64) -> Self {
        // Through f32: the double rounding is below 2^-24 of the value, a thousandth of f16's own.
        f16::from_f32(value as f32)
    }
    fn round_all(row: &[f32], factor: f64, stored: &mut [Self]) {
        const STEP: usize = 256;
        let mut wide = [0.0; STEP];
        for (stored, row) in stored.chunks_mut(STEP).zip(row.chunks(STEP)) {
            let wide = &mut wide[..row.len()];
            f32::round_all(row, factor, wide);
            stored.convert_from_f32_slice(wide);
        }
    }
}

/// Unit rows and scales of `rows`, `[n, dim]`. A row of zeros has scale 0.
///
/// # Errors
/// [`Error::Shape`] if `rows` does not divide into rows of `dim`; [`Error::NotFinite`] if a row
/// holds a NaN or an infinity, or its norm exceeds f32; [`Error::Stopped`].
pub fn encode<T: Stored>(
    rows: &[f32],
    dim: usize,
    watch: &Watch<'_>,
) -> Result<(Vec<T>, Vec<f32>), Error> {
    let mut stored = vec![T::default(); rows.len()];
    let scales = encode_into(rows, dim, &mut stored, watch)?;
    Ok((stored, scales))
}

/// As [`encode`], into memory that is there: `[n, dim]`. Fresh memory costs more than the work.
///
/// # Errors
/// As [`encode`]; [`Error::Shape`] if `stored` is not as long as `rows`.
pub fn encode_into<T: Stored>(
    rows: &[f32],
    dim: usize,
    stored: &mut [T],
    watch: &Watch<'_>,
) -> Result<Vec<f32>, Error> {
    if dim == 0 || !rows.len().is_multiple_of(dim) {
        return Err(Error::shape("rows", format!("[n, {dim}]"), rows.len()));
    }
    if stored.len() != rows.len() {
        return Err(Error::shape("stored", format!("{} values", rows.len()), stored.len()));
    }
    let mut scales = Vec::with_capacity(rows.len() / dim);
    let set = InstructionSet::best();
    let mut steps = watch.steps();
    for (index, (row, stored)) in
        rows.chunks_exact(dim).zip(stored.chunks_exact_mut(dim)).enumerate()
    {
        steps.add(dim)?;
        let norm = set.squares(row).sqrt();
        let scale = norm as f32;
        if !scale.is_finite() {
            return Err(not_finite(row, index, norm));
        }
        scales.push(scale);
        if scale > 0.0 {
            T::round_all(row, 1.0 / f64::from(scale), stored);
        } else {
            stored.fill(T::default());
        }
    }
    Ok(scales)
}

/// What is not finite of a row: a value, or its norm.
pub(super) fn not_finite(row: &[f32], index: usize, norm: f64) -> Error {
    let column = row.iter().position(|value| !value.is_finite());
    let place = column.map_or(format!("the norm of row {index}"), |column| {
        format!("row {index}, column {column}")
    });
    let value = column.map_or(norm, |column| f64::from(row[column]));
    Error::NotFinite { argument: "rows", place, value }
}

/// One part of factored rows: the factors of a matrix, or a vector that is kept as it is.
pub struct Part<'a> {
    /// `[batch]` left factors; none for a vector.
    pub left: Option<Vec<&'a [f32]>>,
    /// `[batch]` right factors, or vectors.
    pub right: Vec<&'a [f32]>,
    /// Whether a one follows the left factor, and the right one: the bias's input.
    pub ones: [bool; 2],
}

impl Part<'_> {
    /// The lengths of both sides, with the ones.
    fn lengths(&self) -> [usize; 2] {
        let length = |rows: &[&[f32]]| rows.first().map_or(0, |row| row.len());
        let left = self.left.as_ref().map_or(0, |left| length(left) + usize::from(self.ones[0]));
        [left, length(&self.right) + usize::from(self.ones[1])]
    }
}

/// Rows of factors, `[batch, width]`, of gradients of unit norm, and the norms of the gradients.
///
/// The gradient that a row stands for is, part by part, the outer product of its factors, or its
/// vector. Both factors of a part get the same norm. A norm that is not finite says that a value
/// is not; its row is zeros.
///
/// # Errors
/// [`Error::Shape`] if a part has another batch, or rows of several lengths; [`Error::Stopped`].
pub fn encode_factors<T: Stored>(
    parts: &[Part<'_>],
    batch: usize,
    watch: &Watch<'_>,
) -> Result<(Vec<T>, Vec<f32>), Error> {
    for part in parts {
        for side in part.left.iter().chain([&part.right]) {
            if side.len() != batch || side.iter().any(|row| row.len() != side[0].len()) {
                return Err(Error::shape(
                    "parts",
                    format!("{batch} rows of one length"),
                    side.len(),
                ));
            }
        }
    }
    let width: usize = parts.iter().flat_map(Part::lengths).sum();
    let mut stored = vec![T::default(); batch * width];
    let mut norms = Vec::with_capacity(batch);
    let set = InstructionSet::best();
    let mut sizes = Vec::with_capacity(parts.len());
    let mut steps = watch.steps();
    for row in 0..batch {
        steps.add(width)?;
        sizes.clear();
        sizes.extend(parts.iter().map(|part| {
            let [left, right] = part.ones.map(|one| f64::from(u8::from(one)));
            let left =
                part.left.as_ref().map_or(1.0, |rows| (set.squares(rows[row]) + left).sqrt());
            [left, (set.squares(part.right[row]) + right).sqrt()]
        }));
        let norm = sizes.iter().map(|[left, right]| (left * right).powi(2)).sum::<f64>().sqrt();
        norms.push(norm as f32);
        if norm == 0.0 || !(norm as f32).is_finite() {
            continue;
        }
        let mut out = &mut stored[row * width..][..width];
        for (part, &[left_size, right_size]) in parts.iter().zip(&sizes) {
            let share = left_size * right_size / norm;
            let each = if part.left.is_some() { share.sqrt() } else { share };
            let left = part.left.as_ref().map(|rows| (rows[row], part.ones[0], left_size));
            for (values, one, size) in
                left.into_iter().chain([(part.right[row], part.ones[1], right_size)])
            {
                let (here, rest) = out.split_at_mut(values.len() + usize::from(one));
                out = rest;
                if size > 0.0 && each > 0.0 {
                    let (values_out, one_out) = here.split_at_mut(values.len());
                    T::round_all(values, each / size, values_out);
                    if let Some(one) = one_out.first_mut() {
                        *one = T::round(each / size);
                    }
                }
            }
        }
    }
    Ok((stored, norms))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_row_comes_back_within_half_a_step_of_f16(
            row in prop::collection::vec(-1f32..1.0, 1..50), exponent in -30i32..30,
        ) {
            let row: Vec<f32> = row.iter().map(|value| value * 10f32.powi(exponent)).collect();
            let (stored, scales) = encode::<f16>(&row, row.len(), &Watch::none()).unwrap();
            for (value, stored) in row.iter().zip(stored) {
                let back = stored.to_f64() * f64::from(scales[0]);
                // Half a step of f16 is 2^-11 of the value, or 2^-25 of the scale when subnormal;
                // below f32's normal range the scale itself has fewer digits.
                let bound = f64::from(value.abs()) / 2000.0 + f64::from(scales[0]) / 3e7;
                prop_assert!((back - f64::from(*value)).abs() <= bound);
            }
        }
    }

    #[test]
    fn factors_of_a_row_multiply_to_a_unit_gradient() {
        // One matrix with a bias, (2) x (3 and a one), and one vector of two values.
        let (left, right, vector) = ([3.0, -4.0], [1.0, 2.0, -2.0], [5.0, 0.5]);
        let parts = [
            Part { left: Some(vec![&left]), right: vec![&right], ones: [false, true] },
            Part { left: None, right: vec![&vector], ones: [false, false] },
        ];
        let (row, norms) = encode_factors::<f32>(&parts, 1, &Watch::none()).unwrap();
        let norm = (25.0f64 * 10.0 + 25.25).sqrt();
        assert!((f64::from(norms[0]) - norm).abs() < 1e-5);
        assert_eq!(row.len(), 2 + 4 + 2);
        for (i, left) in left.iter().enumerate() {
            for (j, right) in right.iter().chain([&1.0]).enumerate() {
                let found = f64::from(row[i]) * f64::from(row[2 + j]) * norm;
                assert!((found - f64::from(left * right)).abs() < 1e-5);
            }
        }
        for (found, value) in row[6..].iter().zip(vector) {
            assert!((f64::from(*found) * norm - f64::from(value)).abs() < 1e-5);
        }
        let length = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>();
        assert!((length(&row[..2]) - length(&row[2..6])).abs() < 1e-6);
    }

    #[test]
    fn factored_rows_that_are_zero_or_not_finite_say_so() {
        for (value, norm) in [(0.0, 0.0), (f32::NAN, f32::NAN), (f32::INFINITY, f32::INFINITY)] {
            let (left, right) = ([value, value], [1.0, 1.0]);
            let part = Part { left: Some(vec![&left]), right: vec![&right], ones: [false, false] };
            let (row, norms) = encode_factors::<f16>(&[part], 1, &Watch::none()).unwrap();
            assert!(norms[0] == norm || (norms[0].is_nan() && norm.is_nan()));
            assert!(row.iter().all(|value| *value == f16::ZERO));
        }
        let part = Part { left: None, right: vec![&[1.0]], ones: [false, false] };
        assert!(encode_factors::<f16>(&[part], 2, &Watch::none()).is_err());
    }

    #[test]
    fn a_zero_row_has_scale_zero() {
        assert_eq!(
            encode::<f32>(&[0.0, 0.0], 2, &Watch::none()).unwrap(),
            (vec![0.0, 0.0], vec![0.0])
        );
    }

    #[test]
    fn not_finite_rows_and_norms_are_refused() {
        for row in [[1.0, f32::NAN], [f32::INFINITY, 0.0], [f32::MAX, f32::MAX]] {
            assert!(matches!(encode::<f16>(&row, 2, &Watch::none()), Err(Error::NotFinite { .. })));
        }
    }
}
