//! An f32 master weight in two halves: the bf16 weight that forward and backward compute with, and
//! the int16 remainder. NVIDIA's Transformer Engine has the same rule (`store_param_remainders`).

/// The master weight's two halves: its bf16 rounding (ties away from zero) and what [`join`] needs
/// to restore it. Lossless for every bit pattern.
#[must_use]
pub fn split(master: f32) -> (u16, i16) {
    let bits = master.to_bits();
    ((bits.wrapping_add(0x8000) >> 16) as u16, ((bits & 0xFFFF) as u16).cast_signed())
}

/// The master weight of the two halves that [`split`] made of it.
#[must_use]
pub fn join(weight: u16, remainder: i16) -> f32 {
    let rounded = u32::from(weight) << 16;
    f32::from_bits(rounded.wrapping_add_signed(i32::from(remainder)))
}
