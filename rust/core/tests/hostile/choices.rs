//! Bytes as choices.

use bytemuck::Pod;

/// What is chosen by some bytes, and by zeros after the last.
pub(super) struct Choices<'a> {
    rest: &'a [u8],
    /// How many things may still be spoilt: what is wrong everywhere is refused at once.
    wrong: usize,
}

impl<'a> Choices<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let mut choices = Self { rest: bytes, wrong: 0 };
        choices.wrong = choices.below(4);
        choices
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.rest.split_first() else { return 0 };
        self.rest = rest;
        byte
    }

    pub(super) fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Below `count`, which is not 0.
    pub(super) fn below(&mut self, count: usize) -> usize {
        let bytes = if count <= 256 { 1 } else { 3 };
        (0..bytes).fold(0, |number, _| number << 8 | usize::from(self.byte())) % count
    }

    /// Once in so many times.
    pub(super) fn once_in(&mut self, count: usize) -> bool {
        self.below(count) == count - 1
    }

    /// Whether to spoil something.
    fn spoils(&mut self) -> bool {
        let spoils = self.wrong > 0 && self.once_in(5);
        self.wrong -= usize::from(spoils);
        spoils
    }

    /// Mostly what is right, and else any number, most of them those where something ends.
    pub(super) fn about(&mut self, right: u64) -> u64 {
        if !self.spoils() {
            return right;
        }
        match self.below(6) {
            0 => right.wrapping_add(1),
            1 => right.wrapping_sub(1),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_neg(),
            4 => right.wrapping_mul(1 << self.below(64)),
            _ => self.word(),
        }
    }

    /// Numbers that repeat, and do not fit in a pattern.
    pub(super) fn noise(&mut self, count: usize) -> Vec<u8> {
        let (mut state, calm) = (self.word() | 1, self.once_in(4));
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if calm { (state >> 62) as u8 } else { (state >> 56) as u8 }
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    /// Numbers from -1 to 1, on a grid that is coarse or fine.
    pub(super) fn values(&mut self, count: usize) -> Vec<f32> {
        let scale = [1.0, 1e-30, 1e30, 0.0][self.below(16).saturating_sub(12)];
        let noise = self.noise(2 * count);
        let value = |pair: &[u8]| f32::from(i16::from_le_bytes([pair[0], pair[1]])) / 32768.0;
        noise.chunks(2).map(|pair| value(pair) * scale).collect()
    }

    /// Mostly leaves numbers as they are, else spoils them in some places: bits, sizes, order.
    pub(super) fn spoil<T: Pod>(&mut self, values: &mut Vec<T>) {
        if !self.spoils() {
            return;
        }
        for _ in 0..=self.below(3) {
            let at = if values.is_empty() { 0 } else { self.below(values.len()) };
            match self.below(7) {
                0 => values.truncate(at),
                1 => values.extend_from_within(at..),
                2 => values.push(T::zeroed()),
                3 if !values.is_empty() => {
                    let other = self.below(values.len());
                    values.swap(at, other);
                }
                4 if !values.is_empty() => {
                    let other = self.below(values.len());
                    values[at] = values[other];
                }
                5 => {
                    if let Some(value) = values.get_mut(at) {
                        let bytes = bytemuck::bytes_of_mut(value);
                        bytes.fill([0, 0xFF, 0x7F, 0x80][self.below(4)]);
                    }
                }
                _ => {
                    if let Some(value) = values.get_mut(at) {
                        let bytes = bytemuck::bytes_of_mut(value);
                        let place = self.below(bytes.len());
                        bytes[place] ^= 1 << self.below(8);
                    }
                }
            }
        }
    }
}
