use super::*;
use proptest::prelude::*;

/// Records of the given sizes, one tensor filling each.
pub(crate) fn manifest(chunk_parameters: u64, records: &[(StateFormat, u64)]) -> Manifest {
    let name = |index: usize| format!("layer.{index}");
    Manifest {
        chunk_parameters,
        drives: 1,
        durability: Durability::Step,
        content: Content::Training,
        records: records
            .iter()
            .enumerate()
            .map(|(index, &(format, parameters))| Record { name: name(index), format, parameters })
            .collect(),
        tensors: records
            .iter()
            .enumerate()
            .map(|(index, &(_, parameters))| Tensor {
                name: format!("{}.weight", name(index)),
                record: index,
                offset: 0,
                shape: vec![parameters],
            })
            .collect(),
        model: serde_json::Value::Null.into(),
    }
}

/// The same as a store of tensors, each with the bytes of its record.
pub(crate) fn of_tensors_manifest(records: &[(StateFormat, u64)]) -> Manifest {
    let mut manifest = Manifest { content: Content::Tensors, ..manifest(4096, records) };
    for (tensor, record) in manifest.tensors.iter_mut().zip(&manifest.records) {
        tensor.name.clone_from(&record.name);
    }
    manifest
}

fn any_format() -> impl Strategy<Value = StateFormat> {
    prop_oneof![
        Just(StateFormat::Bf16),
        Just(StateFormat::F32),
        Just(StateFormat::Raw16),
        Just(StateFormat::Raw8)
    ]
}

proptest! {
    #[test]
    fn extents_are_aligned_and_never_overlap(
        records in prop::collection::vec((any_format(), (1_u64..100).prop_map(|n| n * 128)), 1..6),
        of_tensors in any::<bool>(),
    ) {
        let layout = if of_tensors {
            let records: Vec<_> = records.iter().map(|(_, n)| (StateFormat::Raw8, *n)).collect();
            Layout::new(&of_tensors_manifest(&records)).expect("valid")
        } else {
            Layout::new(&manifest(4096, &records)).expect("valid")
        };
        let mut extents = Vec::new();
        for (index, chunk) in layout.chunks().iter().enumerate() {
            for group in Group::ALL {
                let bytes = chunk.extent_bytes(group) as u64;
                extents.push((layout.extent_offset(index, group, CopyId::A), bytes));
                if of_tensors || chunk.format().is_trainable() {
                    extents.push((layout.extent_offset(index, group, CopyId::B), bytes));
                }
            }
        }
        extents.retain(|(_, bytes)| *bytes > 0);
        extents.sort_unstable();
        for pair in extents.windows(2) {
            prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
        for (offset, bytes) in &extents {
            prop_assert!(offset % 4096 == 0 && bytes % 4096 == 0);
            prop_assert!(offset + bytes <= layout.data_bytes(0));
        }
    }

    #[test]
    fn hostile_manifests_are_refused_not_obeyed(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Manifest::parse(&bytes);
    }
}

/// A manifest of 64 MiB was within its limit, and the value built from `[{"":0},{"":0},...` in it
/// takes 93 times as much: opening such a store took 6 GB. Its length is told first now.
#[test]
fn a_long_model_configuration_is_refused_before_it_is_built() {
    let text = |entries: usize| {
        let mut manifest = manifest(4096, &[(StateFormat::F32, 512)]);
        manifest.model = serde_json::json!(vec![0; entries]).into();
        serde_json::to_vec(&manifest).expect("JSON")
    };
    // `[0,0,...]`: two bytes an entry, and one.
    let longest = (crate::store::manifest::MODEL_BYTES_MAX - 1) / 2;
    assert!(Manifest::parse(&text(longest)).is_ok());
    let refused = Manifest::parse(&text(longest + 1)).expect_err("too long");
    assert!(refused.contains("has 1048577 bytes, the limit is 1048576"), "{refused}");
    let deep = [b'['; 10_000];
    assert!(Manifest::parse(&[&b"{\"model\":"[..], &deep].concat()).is_err());
    // Kept as text, it must all the same be what whoever reads it can build.
    let nested = serde_json::to_string(&manifest(4096, &[(StateFormat::F32, 512)])).expect("JSON");
    let nested = nested
        .replace("\"model\":null", &format!("\"model\":{}{}", "[".repeat(200), "]".repeat(200)));
    assert!(Manifest::parse(nested.as_bytes()).expect_err("deep").contains("recursion limit"));
}

/// 60,000 tensors were refused by the limit for a model's configuration, as if there were a model.
#[test]
fn the_list_of_many_tensors_may_be_long_and_is_nothing_else() {
    let text = |entry: &str| {
        let count = 80_000;
        let described = vec![entry; count].join(",");
        let shape = vec![(StateFormat::Raw8, 128); count];
        let text = serde_json::to_string(&of_tensors_manifest(&shape)).expect("JSON");
        text.replace("\"model\":null", &format!("\"model\":{{\"tensors\":[{described}]}}"))
    };
    Manifest::parse(text("[\"float32\",[32]]").as_bytes()).expect("a list of tensors");
    for entry in ["[\"float32\",[[]]]", "{\"\":0,\"b\":[[[]]]}", "[\"float32\",[-1]]"] {
        Manifest::parse(text(entry).as_bytes()).expect_err("anything else");
    }
}

#[test]
fn a_chunk_as_a_record_is_in_the_place_that_it_has() {
    let formats = [(StateFormat::Bf16, 8192 + 128), (StateFormat::F32, 4096)];
    let layout = Layout::new(&manifest(4096, &formats)).expect("valid");
    let units = layout.chunks_as_records();
    assert_eq!(units.records(), [0..1, 1..2, 2..3, 3..4]);
    assert_eq!((units.record_parameters(2), units.record_weight_bytes(2)), (128, 4096));
    let places = |layout: &Layout| {
        let chunks = 0..layout.chunks().len();
        let entries = chunks.flat_map(|chunk| Group::ALL.map(|group| (chunk, group)));
        let place = |(chunk, group): (usize, Group)| {
            let bytes = layout.chunks()[chunk].extent_bytes(group);
            let offset = layout.extent_offset(chunk, group, CopyId::B);
            (bytes, offset, layout.sum_range(layout.entry(chunk, group)))
        };
        entries.map(place).collect::<Vec<_>>()
    };
    assert_eq!(places(&units), places(&layout));
    assert_eq!((units.unit_name(1), layout.unit_name(1)), ("chunk 1".into(), "record 1".into()));
}

#[test]
fn a_store_of_bf16_takes_24_bytes_a_parameter() {
    let layout = Layout::new(&manifest(1 << 21, &[(StateFormat::Bf16, 1 << 23)])).expect("valid");
    assert_eq!(layout.data_bytes(0), 24 << 23);
}

#[test]
fn planes_lie_one_behind_the_other() {
    let layout = Layout::new(&manifest(4096, &[(StateFormat::Bf16, 4096 + 128)])).expect("valid");
    let last = &layout.chunks()[1];
    assert_eq!(last.plane_ranges(Group::Update), vec![0..256, 256..768, 768..1280]);
    assert_eq!(
        (last.extent_bytes(Group::Update), last.stored_bytes(Group::Update, 1)),
        (4096, 4096)
    );
}

#[test]
fn a_store_of_tensors_takes_two_bytes_a_byte_and_scratch_one() {
    let mut manifest = of_tensors_manifest(&[(StateFormat::Raw8, 1 << 21)]);
    assert_eq!(Layout::new(&manifest).expect("valid").data_bytes(0), 2 << 21);
    manifest.durability = Durability::Scratch;
    assert_eq!(Layout::new(&manifest).expect("valid").data_bytes(0), 1 << 21);
}

#[test]
fn a_store_of_tensors_holds_nothing_else() {
    let good = of_tensors_manifest(&[(StateFormat::Raw8, 512), (StateFormat::Raw8, 128)]);
    let cases: [fn(&mut Manifest); 6] = [
        |m| m.records[0].format = StateFormat::F32,
        |m| m.records[0].name = "another".into(),
        |m| m.tensors[0].shape = vec![16, 32],
        |m| m.tensors[1].offset = 128,
        |m| m.tensors[1].record = 0,
        |m| drop(m.tensors.pop()),
    ];
    assert_eq!(good.validate(), Ok(()));
    for (index, spoil) in cases.iter().enumerate() {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert!(bad.validate().is_err(), "case {index}");
    }
}

#[test]
fn overlaps_misalignment_and_overflow_are_refused() {
    let good = manifest(4096, &[(StateFormat::F32, 512)]);
    let cases: [fn(&mut Manifest); 6] = [
        |m| m.tensors[0].shape = vec![513],
        |m| m.tensors[0].shape = vec![u64::MAX, 3],
        |m| m.tensors[0].offset = 1,
        |m| m.tensors[0].record = 5,
        |m| m.tensors.push(m.tensors[0].clone()),
        |m| m.records[0].parameters = u64::MAX - 127,
    ];
    assert_eq!(good.validate(), Ok(()));
    for (index, spoil) in cases.iter().enumerate() {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert!(bad.validate().is_err(), "case {index}");
    }
}
