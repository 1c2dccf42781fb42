//! The store that runs start from.

use std::sync::Arc;

use super::memories::{self, Memories};
use crate::io::drives::Drives;
use crate::io::engine::Engine;
use crate::io::engine::memory::Memory;
use crate::io::file::DirectFile;
use crate::memory::ledger::Ledger;
use crate::pipeline::GradientFiles;
use crate::store::layout::tests::manifest;
use crate::store::manifest::{Durability, Manifest};
use crate::store::{Store, StoreCreator};
use crate::units::{CopyId, Group, StateFormat};

/// An imported store that every run starts from.
pub(super) struct Base {
    _folder: tempfile::TempDir,
    pub(super) drives: Drives,
    pub(super) gradient_files: GradientFiles,
    pub(super) image: Memory,
    pub(super) records: Vec<u64>,
    pub(super) is_scratch: bool,
    /// What the mutations need to know of the layout.
    pub(super) data_offset: u64,
    pub(super) copy_bytes: u64,
}

impl Base {
    pub(super) fn new(records: &[u64], durability: Durability, drives: usize) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |drive| folder.path().join(format!("store.{drive}.mtio"));
        let paths: Vec<_> = (0..drives).map(path).collect();
        let ledger = Ledger::new();
        let shape: Vec<_> = records.iter().map(|n| (StateFormat::F32, *n)).collect();
        let engine = Arc::new(Memory::default());
        let over = Arc::clone(&engine) as Arc<dyn Engine>;
        let manifest = Manifest { durability, ..manifest(4096, &shape) };
        let mut creator =
            StoreCreator::over(over, None, &paths, manifest, &ledger).expect("created");
        memories::import(&mut creator, &Memories::imported(records), &ledger);
        creator.finish(b"step 0").expect("finished");
        let drives = Drives::open_waiting(&paths, &mut |_, _| Ok(())).expect("opened");
        let store = Store::open_on(&drives, engine.clone(), [1; 16], &ledger).expect("opened");
        let place = |copy| store.layout().extent_offset(0, Group::Weight, copy);
        let copy_bytes = place(CopyId::B) - place(CopyId::A);
        let data_offset = store.data_offset();
        let image = engine.copy();
        let (records, is_scratch) = (records.to_vec(), durability == Durability::Scratch);
        // Only its number counts: the bytes lie in the image, with what the process before left there.
        let file = |_| DirectFile::in_memory(1 << 20).expect("a file");
        let files = (0..drives.count()).map(file).collect();
        let gradient_files = GradientFiles::over(files).expect("numbered");
        Self {
            _folder: folder,
            drives,
            gradient_files,
            image,
            records,
            is_scratch,
            data_offset,
            copy_bytes,
        }
    }
}
