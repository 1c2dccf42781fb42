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
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00452000 r-xp 00000000 08:02 173521 /usr/bin/dbus-daemon
Size:                328 kB
AnonHugePages:      2048 kB
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
AnonHugePages:      2048 kB
VmFlags: rd wr mr mw me ac hg
7f0000400000-7f0000800000 rw-p 00000000 00:00 0
Size:               4096 kB
AnonHugePages:      4096 kB
7f0000a00000-7f0000c00000 rw-p 00000000 00:00 0
AnonHugePages:      2048 kB
";

    fn parsed(start: usize, bytes: usize) -> Option<(u64, u64)> {
        let start = 0x7f00_0000_0000 + start;
        HugePages::parse(SMAPS, start..start + bytes).map(|found| (found.huge, found.bytes))
    }

    #[test]
    fn only_the_regions_own_mappings_count() {
        assert_eq!(parsed(0, 4 << 20), Some((2 << 20, 4 << 20)));
        assert_eq!(parsed(0, 8 << 20), Some((6 << 20, 8 << 20)), "two mappings");
        assert_eq!(parsed(10 << 20, 2 << 20), Some((2 << 20, 2 << 20)));
    }

    #[test]
    fn what_cannot_be_huge_or_is_not_told_is_nothing() {
        assert_eq!(parsed(0, 1 << 20), None, "smaller than a huge page");
        assert_eq!(parsed(0, (4 << 20) + 4096), Some((4 << 20, 4 << 20)), "whole 2 MiB count");
        assert_eq!(parsed(8 << 20, 2 << 20), None, "no mapping there");
    }

    #[test]
    fn nine_tenths_are_enough() {
        let pages = |huge: u64| HugePages { huge: huge << 20, bytes: 20 << 20 };
        assert!(pages(20).is_enough() && pages(18).is_enough());
        assert!(!pages(16).is_enough() && !pages(0).is_enough());
    }
}
