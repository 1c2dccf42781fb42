//! Feeds the parsers of the store with whatever finds new ways through them.
#![no_main]

use std::sync::LazyLock;

use megatrain_io::store::tests::hostile::Hostile;
use tempfile::TempDir;

static HOSTILE: LazyLock<(TempDir, Hostile)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let hostile = Hostile::new(folder.path());
    (folder, hostile)
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| HOSTILE.1.check(input));
