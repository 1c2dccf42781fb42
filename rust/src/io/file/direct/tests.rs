use super::*;

#[test]
fn pages_of_4_kib_meet_what_divides_them() {
    let met = |memory, offset| DioAlignment { memory, offset }.is_met();
    assert!(met(4, 512) && met(512, 4096));
    assert!(!met(0, 0), "zero means no direct I/O");
    assert!(!met(512, 8192) && !met(8192, 512) && !met(512, 16384));
}

fn is_open_direct(file: &File) -> bool {
    fcntl_getfl(file).expect("flags").contains(OFlags::DIRECT)
}

#[test]
fn what_is_said_of_a_file_is_how_it_was_opened() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("file");
    let opened = open(&path, Access::Create).expect("opened");
    assert_eq!(opened.direct, is_open_direct(&opened.file));
    assert!(opened.alignment.is_none_or(|alignment| alignment.is_met() == opened.direct));
}
