//! Whole stores: what damage and strangers may do to their bytes.

#[cfg(test)]
mod corruption;
pub mod hostile;
#[cfg_attr(not(test), allow(dead_code, reason = "the fuzz target compares less than the tests"))]
pub(in crate::store) mod images;
#[cfg(test)]
mod names;
