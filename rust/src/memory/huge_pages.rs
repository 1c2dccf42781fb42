//! How much of a mapping lies in huge pages: asking for them is not getting them, and direct I/O from
//! small pages is half as fast.

use std::fs;
use std::ops::Range;

use crate::units::HUGE_PAGE_BYTES;

/// What of a region could be huge pages, and what is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// Bytes that lie in huge pages.
    pub huge: u64,
    /// Bytes of the region, without what is left over after its last whole 2 MiB.
    pub bytes: u64,
}

impl HugePages {
    /// Whether nearly all of it is huge: a few pages that the kernel could not find cost nothing.
    #[must_use]
    pub fn is_enough(self) -> bool {
        self.huge >= self.bytes / 10 * 9
    }

    /// As `/proc/self/smaps` has it; `None` for less than 2 MiB, and where the kernel does not say.
    pub(crate) fn of(addresses: Range<usize>) -> Option<Self> {
        if addresses.len() < HUGE_PAGE_BYTES {
            return None; // the kernel takes milliseconds to write the list
        }
        Self::parse(&fs::read_to_string("/proc/self/smaps").ok()?, addresses)
    }

    fn parse(smaps: &str, addresses: Range<usize>) -> Option<Self> {
        let bytes = (addresses.len() / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES) as u64;
        if bytes == 0 {
            return None;
        }
        let (mut inside, mut told, mut huge) = (false, false, 0);
        for line in smaps.lines() {
            if let Some(mapping) = range_of(line) {
                inside = mapping.start < addresses.end && mapping.end > addresses.start;
            } else if inside && let Some(rest) = line.strip_prefix("AnonHugePages:") {
                told = true;
                huge += rest.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10;
            }
        }
        // The kernel may have joined a neighbour to the region's mapping: never more than all.
        told.then_some(Self { huge: huge.min(bytes), bytes })
    }
}

/// The addresses in the first line of a mapping: `7f0000000000-7f0000200000 rw-p ...`.
fn range_of(line: &str) -> Option<Range<usize>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests;
