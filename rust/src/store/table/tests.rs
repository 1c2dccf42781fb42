use super::*;
use crate::store::layout::tests::manifest;
use crate::units::StateFormat;
use proptest::prelude::*;

fn layout() -> Layout {
    Layout::new(&manifest(4096, &[(StateFormat::Bf16, 8192), (StateFormat::Raw16, 128)]))
        .expect("valid")
}

#[test]
fn a_table_comes_back_as_it_went() {
    let layout = layout();
    let mut table = Table::empty(&layout);
    table.set(
        &layout,
        1,
        Group::Update,
        Entry { generation: 5, copy: CopyId::B, planes: 3, updates: 7 },
        &[77],
    );
    let mut bytes = vec![0xff; Table::encoded_bytes(&layout) + 100];
    table.encode(&mut bytes);
    let back = Table::decode(&layout, 5, true, &bytes).expect("valid");
    assert_eq!(back, table);
    assert_eq!(back.sums(&layout, 1, Group::Update), &[77]);
    assert_eq!(Table::decode(&layout, 4, true, &bytes), None, "an entry from the future");
    assert_eq!(Table::decode(&layout, 5, false, &bytes), None, "one t for all records");
}

#[test]
fn only_planes_that_are_trained_and_written_have_updates() {
    let layout = layout();
    let mut table = Table::empty(&layout);
    let written = Entry { generation: 1, copy: CopyId::A, planes: 1, updates: 0 };
    table.set(&layout, 0, Group::Weight, written, &[1]);
    table.set(&layout, 0, Group::Update, written, &[2]);
    table.set(&layout, 2, Group::Weight, written, &[3]);
    let mut bytes = vec![0; Table::encoded_bytes(&layout)];
    table.encode(&mut bytes);
    let with = |at: usize, value: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        Table::decode(&layout, 1, true, &bytes)
    };
    let at = |chunk, group| layout.entry(chunk, group) * ENTRY_BYTES;
    let updated = with(at(0, Group::Update) + 12, 9).expect("trained and written");
    assert_eq!(updated.entry(&layout, 0, Group::Update).updates, 9);
    // Weights, planes that were never written, a frozen record, and the two bytes before the field.
    for place in
        [at(0, Group::Weight), at(1, Group::Update), at(2, Group::Weight), at(2, Group::Update)]
    {
        assert_eq!(with(place + 12, 1), None);
    }
    assert_eq!(with(at(0, Group::Update) + 10, 1), None);
    assert_eq!(with(at(0, Group::Update) + 11, 1), None);
}

proptest! {
    #[test]
    fn hostile_bytes_are_refused_or_consistent(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let layout = layout();
        if let Some(table) = Table::decode(&layout, 3, true, &bytes) {
            for chunk in 0..layout.chunks().len() {
                for group in Group::ALL {
                    let _ = table.sums(&layout, chunk, group);
                }
            }
        }
    }
}
