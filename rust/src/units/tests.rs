use super::*;

#[test]
fn round_up_reports_overflow() {
    assert_eq!(round_up(4097, 4096), Some(8192));
    assert_eq!(round_up(u64::MAX, 4096), None);
}
