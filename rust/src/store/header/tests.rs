use super::*;
use crate::store::layout::tests::manifest;
use crate::units::StateFormat;

fn header() -> Header {
    let layout = Layout::new(&manifest(4096, &[(StateFormat::Bf16, 8192)])).expect("valid");
    Header::new([3; 16], &layout, b"{}", 0).expect("small")
}

#[test]
fn a_header_comes_back_as_it_went() {
    assert_eq!(Header::decode(&header().encode()[..]), Ok(Some(header())));
}

#[test]
fn a_flipped_bit_makes_it_no_header() {
    let mut page = header().encode();
    page[100] ^= 1;
    assert_eq!(Header::decode(&page[..]), Ok(None));
}

#[test]
fn a_newer_format_is_refused_by_number() {
    let mut page = header().encode();
    page[12] = 9;
    let sum = crate::store::checksum::crc32c(&page[..PAGE_BYTES - 4]).to_le_bytes();
    page[PAGE_BYTES - 4..].copy_from_slice(&sum);
    let reason = Header::decode(&page[..]).expect_err("refused");
    assert!(reason.contains("format 9.4") && reason.contains("not modified"), "{reason}");
}

#[test]
fn the_parts_do_not_overlap() {
    let h = header();
    assert!(TABLES_OFFSET >= CLEAN_MARKER_OFFSET + PAGE_BYTES as u64);
    assert!(h.table_offsets[0] + h.table_bytes <= h.table_offsets[1]);
    assert!(h.table_offsets[1] + h.table_bytes <= h.blob_offsets[0]);
    assert!(h.blob_offsets[1] + BLOB_BYTES_MAX <= h.manifest_offset);
    assert!(h.manifest_offset + h.manifest_bytes <= h.data_offset);
    assert_eq!(h.data_offset % HUGE_PAGE_BYTES as u64, 0);
}
