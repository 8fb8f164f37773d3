//! Norm layers: the gradients of their elementwise weight and bias, sample by sample.

use std::sync::Mutex;

use crate::error::Error;
use crate::kernels::InstructionSet;
use crate::parallel::share;
use crate::stop::Asker;

/// The per-sample gradients of the weight and the bias of a norm over the last dimension, both
/// `[batch, width]`: the sums over positions of `delta * normalised`, and of `delta`.
///
/// `values`, the input, and `delta`, the gradient of the output, are `[batch, terms, width]`; a row
/// is normalised by its mean, if `centred`, and the root of its mean square plus `epsilon` (Ba,
/// Kiros and Hinton, "Layer normalization", arXiv 1607.06450; Zhang and Sennrich, "Root mean square
/// layer normalization", 2019). O(batch · terms · width) time, nothing of the input's size.
///
/// # Errors
/// [`Error::Shape`] if the arrays do not fit together; [`Error::Stopped`].
pub fn gradients(
    values: &[f32],
    delta: &[f32],
    batch: usize,
    width: usize,
    epsilon: f32,
    centred: bool,
    threads: usize,
    asker: &Asker<'_>,
) -> Result<[Vec<f32>; 2], Error> {
    let sample = values.len().checked_div(batch).unwrap_or(0);
    if values.len() != delta.len() || sample * batch != values.len() {
        return Err(Error::shape("delta", format!("{} values", values.len()), delta.len()));
    }
    if width == 0 || !sample.is_multiple_of(width) {
        return Err(Error::shape("values", format!("rows of {width}"), sample));
    }
    let (mut weight, mut bias) = (vec![0.0; batch * width], vec![0.0; batch * width]);
    let rows = weight.chunks_exact_mut(width).zip(bias.chunks_exact_mut(width));
    let rows: Vec<_> = rows.map(Mutex::new).collect();
    // Threads cost more than the work below about a million values each.
    let threads = threads.min(1 + values.len() / (1 << 20));
    share(
        batch,
        threads,
        asker,
        || (),
        |(), row, _| {
            let mut sums = rows[row].lock().map_err(Error::panicked)?;
            let (weight, bias) = &mut *sums;
            let here = row * sample..(row + 1) * sample;
            let (values, delta) = (&values[here.clone()], &delta[here]);
            InstructionSet::best().add_norm_terms(values, delta, epsilon, centred, weight, bias);
            Ok(())
        },
    )?;
    drop(rows);
    Ok([weight, bias])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stop::never;

    #[test]
    fn samples_are_summed_apart_for_any_number_of_threads() {
        let values: Vec<f32> = (0..3 * 4 * 5).map(|i| (i * 7 % 11) as f32).collect();
        let delta: Vec<f32> = (0..3 * 4 * 5).map(|i| (i * 5 % 13) as f32 - 6.0).collect();
        let asker = Asker::new(&never);
        let all = gradients(&values, &delta, 3, 5, 0.5, true, 1, &asker).unwrap();
        assert_eq!(gradients(&values, &delta, 3, 5, 0.5, true, 3, &asker).unwrap(), all);
        for sample in 0..3 {
            let here = sample * 20..(sample + 1) * 20;
            let one = gradients(&values[here.clone()], &delta[here], 1, 5, 0.5, true, 1, &asker);
            for (one, all) in one.unwrap().iter().zip(&all) {
                assert_eq!(one[..], all[sample * 5..][..5]);
            }
        }
        assert!(gradients(&values, &delta, 7, 5, 0.5, true, 1, &asker).is_err());
        assert!(gradients(&values, &delta[1..], 3, 5, 0.5, true, 1, &asker).is_err());
        assert!(gradients(&values, &delta, 3, 0, 0.5, true, 1, &asker).is_err());
        assert!(gradients(&[], &[], 0, 5, 0.5, true, 1, &asker).unwrap()[0].is_empty());
    }
}
