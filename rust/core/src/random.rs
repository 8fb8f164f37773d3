//! The one definition of randomness: a counter-based integer generator.
//!
//! Value `i` of a stream is a function of the stream's key and `i` alone, so it can be had without
//! its forerunners, in any order, on any thread, and is the same on every machine. The mixing
//! function is the finaliser of `SplitMix64` (Steele, Lea and Flood, "Fast splittable pseudorandom
//! number generators", OOPSLA 2014; constants of variant 13 by David Stafford).

/// The version of everything in this file. Rows made under another version do not compare.
pub const HASH_VERSION: u32 = 1;

/// 2^64 divided by the golden ratio, made odd: the increment of `SplitMix64`.
const INCREMENT: u64 = 0x9E37_79B9_7F4A_7C15;

/// Scrambles 64 bits; a bijection.
#[inline]
#[must_use]
pub const fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// Value `counter` of the stream `key`.
#[inline]
#[must_use]
pub const fn value(key: u64, counter: u64) -> u64 {
    mix(key.wrapping_add(counter.wrapping_add(1).wrapping_mul(INCREMENT)))
}

/// A number below `n`, from the upper half of `bits`: uniform, but for 32 bits.
#[inline]
#[must_use]
pub const fn below(bits: u64, n: u32) -> u64 {
    // The product of two 32-bit numbers: its upper half is below the second.
    ((bits >> 32) * n as u64) >> 32
}

/// The key of a parameter's stream, from the seed, its canonical name and its shape.
///
/// Words are absorbed one by one: the seed, the bytes of the name (eight to a word, little-endian,
/// the last padded with zeros), their number, the sizes, their number. The two numbers keep
/// different splits of the same words apart.
#[must_use]
pub fn parameter_key(seed: u64, name: &str, shape: &[u64]) -> u64 {
    let mut key = absorb(0, seed);
    for bytes in name.as_bytes().chunks(8) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        key = absorb(key, u64::from_le_bytes(word));
    }
    key = absorb(key, name.len() as u64);
    for &size in shape {
        key = absorb(key, size);
    }
    absorb(key, shape.len() as u64)
}

pub(crate) const fn absorb(key: u64, word: u64) -> u64 {
    mix((key ^ word).wrapping_add(INCREMENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_splitmix64() {
        // The published first outputs of SplitMix64 from state 1234567 (rosettacode.org,
        // "Pseudo-random numbers/Splitmix64").
        let expected = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        for (counter, expected) in expected.into_iter().enumerate() {
            assert_eq!(value(1_234_567, counter as u64), expected);
        }
    }

    #[test]
    fn keys_differ_by_seed_name_and_shape() {
        let keys = [
            parameter_key(0, "a", &[2, 3]),
            parameter_key(1, "a", &[2, 3]),
            parameter_key(0, "b", &[2, 3]),
            parameter_key(0, "a", &[3, 2]),
            parameter_key(0, "a", &[6]),
            parameter_key(0, "", &[]),
            parameter_key(0, "\0", &[]),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key));
        }
    }
}
