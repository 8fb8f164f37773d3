//! Rows to unit rows and scales.

use half::f16;

use crate::error::Error;

/// A type that stored rows have.
pub trait Stored: Copy + Default + Send + Sync {
    /// The nearest stored value; ties to even.
    fn round(value: f64) -> Self;
}

impl Stored for f32 {
    fn round(value: f64) -> Self {
        value as f32
    }
}

impl Stored for f16 {
    fn round(value: f64) -> Self {
        // Through f32: the double rounding is below 2^-24 of the value, a thousandth of f16's own.
        f16::from_f32(value as f32)
    }
}

/// Unit rows and scales of `rows`, `[n, dim]`. A row of zeros has scale 0.
///
/// # Errors
/// [`Error::Shape`] if `rows` does not divide into rows of `dim`; [`Error::NotFinite`] if a row
/// holds a NaN or an infinity, or its norm exceeds f32.
pub fn encode<T: Stored>(rows: &[f32], dim: usize) -> Result<(Vec<T>, Vec<f32>), Error> {
    if dim == 0 || !rows.len().is_multiple_of(dim) {
        return Err(Error::shape("rows", format!("[n, {dim}]"), rows.len()));
    }
    let mut stored = vec![T::default(); rows.len()];
    let mut scales = Vec::with_capacity(rows.len() / dim);
    for (index, (row, stored)) in
        rows.chunks_exact(dim).zip(stored.chunks_exact_mut(dim)).enumerate()
    {
        let squares: f64 = row.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
        let scale = squares.sqrt() as f32;
        if !scale.is_finite() {
            let column = row.iter().position(|value| !value.is_finite());
            let place = column.map_or(format!("the norm of row {index}"), |column| {
                format!("row {index}, column {column}")
            });
            let value = column.map_or(squares.sqrt(), |column| f64::from(row[column]));
            return Err(Error::NotFinite { argument: "rows", place, value });
        }
        scales.push(scale);
        if scale > 0.0 {
            for (stored, &value) in stored.iter_mut().zip(row) {
                *stored = T::round(f64::from(value) / f64::from(scale));
            }
        }
    }
    Ok((stored, scales))
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
            let (stored, scales) = encode::<f16>(&row, row.len()).unwrap();
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
    fn a_zero_row_has_scale_zero() {
        assert_eq!(encode::<f32>(&[0.0, 0.0], 2).unwrap(), (vec![0.0, 0.0], vec![0.0]));
    }

    #[test]
    fn not_finite_rows_and_norms_are_refused() {
        for row in [[1.0, f32::NAN], [f32::INFINITY, 0.0], [f32::MAX, f32::MAX]] {
            assert!(matches!(encode::<f16>(&row, 2), Err(Error::NotFinite { .. })));
        }
    }
}
