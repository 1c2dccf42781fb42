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
