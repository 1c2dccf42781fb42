use super::*;

#[test]
fn trainable_formats_take_twelve_bytes_a_parameter() {
    for format in [StateFormat::Bf16, StateFormat::F32] {
        let bytes: usize = Group::ALL.iter().map(|g| format.group_bytes(*g)).sum();
        assert_eq!(bytes, 12);
    }
}

#[test]
fn round_up_reports_overflow() {
    assert_eq!(round_up(4097, 4096), Some(8192));
    assert_eq!(round_up(u64::MAX, 4096), None);
}
