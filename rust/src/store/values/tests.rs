use super::*;
use crate::io::engine::choice::Choice;
use crate::memory::ledger::Ledger;
use crate::store::layout::tests::manifest;
use crate::store::recovery::OpenOptions;

const PARAMETERS: usize = 4096;

/// A store with one chunk of this format, whose weights were imported from these values.
fn imported(format: StateFormat, values: &[u8], of: ValueType) -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().expect("a folder");
    let (paths, ledger) = ([folder.path().join("store")], Ledger::new());
    let manifest = manifest(PARAMETERS as u64, &[(format, PARAMETERS as u64)]);
    let mut creator =
        StoreCreator::new(&paths, manifest, Choice::Threads, &ledger).expect("created");
    let slot = Slot::standalone(10 * PARAMETERS, &ledger, "test").expect("memory");
    drop(creator.write_values(0, values, of, slot).expect("written"));
    creator.finish(&[]).expect("finished");
    (folder, Store::open(&paths, OpenOptions::default(), &ledger).expect("opened"))
}

/// Every kind of fp32: both signs, ties between two bf16, values that round up to the next power, NaN.
fn masters() -> Vec<u8> {
    let bits = (0..u32::try_from(PARAMETERS).expect("few")).map(|i| i.wrapping_mul(0x9E37_79B9));
    let odd = [0x3F80_8000, 0xBF80_8000, 0x3FFF_FFFF, 0x7FC0_1234, 0x7F80_0000, 0x8000_0000, 1];
    odd.into_iter().chain(bits).take(PARAMETERS).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn an_fp32_master_comes_back_to_the_bit_from_both_trained_formats() {
    for format in [StateFormat::Bf16, StateFormat::F32] {
        let (_folder, store) = imported(format, &masters(), ValueType::F32);
        assert_eq!(store.read_plane(0, "master").expect("read"), masters(), "{format:?}");
    }
}

#[test]
fn bf16_values_are_their_own_masters_and_need_no_update_planes() {
    let values: Vec<u8> =
        masters().chunks_exact(4).flat_map(|value| [value[2], value[3]]).collect();
    let widened: Vec<u8> = values.chunks_exact(2).flat_map(|v| [0, 0, v[0], v[1]]).collect();
    for format in [StateFormat::Bf16, StateFormat::F32] {
        let (_folder, store) = imported(format, &values, ValueType::Bf16);
        assert_eq!(store.read_plane(0, "master").expect("read"), widened, "{format:?}");
        let entry = store.committed().table.entry(store.layout(), 0, Group::Update);
        assert_eq!(entry.planes, 0);
    }
}

#[test]
fn planes_that_a_format_lacks_and_values_that_do_not_fit_are_refused() {
    let (_folder, store) =
        imported(StateFormat::Raw16, &masters()[..2 * PARAMETERS], ValueType::Raw);
    assert_eq!(store.read_plane(0, "weight").expect("read"), &masters()[..2 * PARAMETERS]);
    for (chunk, plane) in [(0, "master"), (0, "exp_avg"), (1, "weight")] {
        assert!(matches!(store.read_plane(chunk, plane), Err(Error::Invalid { .. })), "{plane}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (paths, ledger) = ([folder.path().join("store")], Ledger::new());
    let manifest = manifest(PARAMETERS as u64, &[(StateFormat::Raw16, PARAMETERS as u64)]);
    let mut creator =
        StoreCreator::new(&paths, manifest, Choice::Threads, &ledger).expect("created");
    for (chunk, bytes, of) in [
        (0, 4 * PARAMETERS, ValueType::F32),
        (0, PARAMETERS, ValueType::Raw),
        (1, 2 * PARAMETERS, ValueType::Raw),
    ] {
        let slot = Slot::standalone(10 * PARAMETERS, &ledger, "test").expect("memory");
        let refused = creator.write_values(chunk, &masters()[..bytes], of, slot);
        assert!(matches!(refused, Err(Error::Invalid { .. })), "chunk {chunk}, {of:?}");
    }
}
