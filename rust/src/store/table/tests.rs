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
        Entry { generation: 5, copy: CopyId::B, planes: 3 },
        &[77],
    );
    let mut bytes = vec![0xff; Table::encoded_bytes(&layout) + 100];
    table.encode(&mut bytes);
    let back = Table::decode(&layout, 5, &bytes).expect("valid");
    assert_eq!(back, table);
    assert_eq!(back.sums(&layout, 1, Group::Update), &[77]);
    assert_eq!(Table::decode(&layout, 4, &bytes), None, "an entry from the future");
}

proptest! {
    #[test]
    fn hostile_bytes_are_refused_or_consistent(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let layout = layout();
        if let Some(table) = Table::decode(&layout, 3, &bytes) {
            for chunk in 0..layout.chunks().len() {
                for group in Group::ALL {
                    let _ = table.sums(&layout, chunk, group);
                }
            }
        }
    }
}
