use super::*;

fn superblock() -> Superblock {
    Superblock {
        uuid: [1; 16],
        generation: 41,
        incarnation: 7,
        life: [2; 16],
        table_crc: 3,
        blob_bytes: 4,
        blob_crc: 5,
        manifest_crc: 6,
    }
}

#[test]
fn a_superblock_comes_back_as_it_went_and_a_torn_one_does_not() {
    let mut page = superblock().encode();
    assert_eq!(Superblock::decode(&page[..]), Some(superblock()));
    page[2048..].fill(0);
    assert_eq!(Superblock::decode(&page[..]), None);
}

/// A superblock of generation 2^64 - 1 was believed, and planning the next write overflowed.
#[test]
fn a_generation_that_nothing_can_follow_is_no_generation() {
    for (generation, holds) in
        [(GENERATION_MAX, true), (GENERATION_MAX + 1, false), (u64::MAX, false)]
    {
        let page = Superblock { generation, ..superblock() }.encode();
        assert_eq!(Superblock::decode(&page[..]).is_some(), holds, "{generation}");
    }
}

#[test]
fn a_clean_marker_vouches_for_one_superblock_only() {
    let marker = superblock().clean_marker();
    assert!(superblock().is_vouched_for_by(&marker[..]));
    assert!(!Superblock { generation: 42, ..superblock() }.is_vouched_for_by(&marker[..]));
    assert!(!Superblock { incarnation: 8, ..superblock() }.is_vouched_for_by(&marker[..]));
}
