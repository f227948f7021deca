//! Archives that are read, and archives that lie.

use super::*;

const LIMITS: Limits = Limits { entries: 100, bytes: 10_000 };

fn head(flag: u8, name: &str, size: u64) -> Head {
    Head { flag, name: name.into(), target: Vec::new(), mode: 0o4755, size, mtime_s: 5 }
}

fn entry(flag: u8, name: &str, bytes: &[u8]) -> Vec<u8> {
    let size = bytes.len() as u64;
    let mut all = [&head(flag, name, size).encode()[..], bytes].concat();
    all.resize(all.len() + usize::try_from(padding(size)).unwrap(), 0);
    all
}

fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    [entries.concat(), vec![0; 2 * BLOCK]].concat()
}

/// Everything that is in it, files with their bytes.
fn read(bytes: &[u8]) -> Result<Vec<(String, MemberKind, Vec<u8>)>, String> {
    let mut archive = Archive::new(bytes, LIMITS);
    let mut all = Vec::new();
    while let Some(member) = archive.next().map_err(|e| e.to_string())? {
        assert_eq!(member.mode & !0o777, 0);
        let mut bytes = Vec::new();
        archive.read_to_end(&mut bytes).map_err(|e| archive.failed(e).to_string())?;
        all.push((String::from_utf8(member.path.join(&b'/')).unwrap(), member.kind, bytes));
    }
    Ok(all)
}

#[track_caller]
fn refused(bytes: &[u8], why: &str) {
    let error = read(bytes).unwrap_err();
    assert!(error.contains(why), "{error}");
}

#[test]
fn an_archive_is_read() {
    let all = read(&archive(&[
        entry(b'5', "./", b""),
        entry(b'5', "a/", b""),
        entry(b'0', "./a//b", &[7; 513]),
        entry(b'g', "pax_global_header", b"12 comment=\n"),
        entry(b'6', "pipe", b""),
        entry(b'x', "x", b"15 path=long/x\n10 size=3\n"),
    ]));
    assert!(all.unwrap_err().contains("an extended header without an entry"));
    let mut last = entry(b'0', "short", b"");
    last.extend_from_slice(&[b"abc", &[0; 509][..]].concat());
    let all = read(&archive(&[
        entry(b'0', "./a//b", &[7; 513]),
        entry(b'L', "", b"q/r\0"),
        entry(b'0', "short", b"r"),
        entry(b'x', "x", b"15 path=long/x\n10 size=3\n"),
        last,
    ]));
    let all = all.unwrap();
    assert_eq!(all[0], ("a/b".into(), MemberKind::File(513), vec![7; 513]));
    assert_eq!(all[1], ("q/r".into(), MemberKind::File(1), b"r".into()));
    // The record takes precedence over the header.
    assert_eq!(all[2], ("long/x".into(), MemberKind::File(3), b"abc".into()));
    assert_eq!(read(&archive(&[])), Ok(Vec::new()));
}

#[test]
fn nothing_leaves_the_directory() {
    for name in ["/etc/passwd", "../x", "a/../../x", "a/..", "..", "//x"] {
        refused(&archive(&[entry(b'0', name, b"")]), "entry 1");
        let record = format!(" path={name}\n");
        let record = format!("{}{record}", record.len() + if record.len() > 97 { 3 } else { 2 });
        refused(&archive(&[entry(b'x', "x", record.as_bytes()), entry(b'0', "x", b"")]), "entry");
    }
    refused(&archive(&[entry(b'0', ".", b"x")]), "it has no name");
    refused(&archive(&[entry(b'0', &"a/".repeat(40), b"x")]), "of the unknown type");
    refused(&archive(&[entry(b'L', "", &b"a/".repeat(300)), entry(b'0', "x", b"")]), "nested too deep");
    refused(&archive(&[entry(b'L', "", &[b'n'; 256]), entry(b'0', "x", b"")]), "an invalid name");
}

#[test]
fn unsupported_entries_are_refused_and_devices_are_skipped() {
    refused(&archive(&[entry(b'1', "x", b"")]), "a hard link");
    refused(&archive(&[entry(b'S', "x", b"")]), "a sparse file");
    refused(&archive(&[entry(b'V', "x", b"")]), "unknown type");
    refused(&archive(&[entry(b'2', "x", b"")]), "impossible target");
    refused(&archive(&[entry(b'5', "x", b"bytes")]), "content of an entry that is not a file");
    refused(&archive(&[entry(b'3', "x", b"bytes")]), "content of an entry that is not a file");
    for device in [b'3', b'4', b'6'] {
        assert_eq!(read(&archive(&[entry(device, "x", b"")])).unwrap()[0].1, MemberKind::Special);
    }
}

#[test]
fn ambiguous_entries_are_refused() {
    let pax = |records: &[u8]| entry(b'x', "x", records);
    let file = || entry(b'0', "x", b"");
    refused(&archive(&[pax(b"9 path=a\n"), pax(b"9 path=b\n"), file()]), "described twice");
    refused(&archive(&[pax(b"9 path=a\n"), entry(b'L', "", b"b"), file()]), "described twice");
    refused(&archive(&[entry(b'g', "x", b"9 path=a\n"), file()]), "one name or size");
    refused(&archive(&[pax(b"9 path=a\n")]), "without an entry after it");
    refused(&archive(&[pax(b"22 GNU.sparse.major=1\n"), file()]), "a sparse file");
    refused(&[archive(&[file()]), archive(&[file()])].concat(), "data after its end");
    refused(&[archive(&[file()]), vec![0; 2 << 20]].concat(), "data after its end");
}

#[test]
fn claims_are_not_believed_and_quotas_hold() {
    // Nothing of that length is made room for.
    refused(&head(b'0', "x", 1 << 30).encode(), "more bytes than the limit of 10000");
    for flag in [b'L', b'K', b'x', b'g'] {
        refused(&head(flag, "x", 0o777_7777_7777).encode(), "too long");
    }
    let parts: Vec<_> = (0..3).map(|n| entry(b'0', &format!("{n}"), &[0; 4000])).collect();
    refused(&archive(&parts), "more bytes than");
    refused(&archive(&vec![entry(b'5', "x", b""); 101]), "more entries than the limit of 100");
    refused(&archive(&vec![entry(b'g', "x", b""); 101]), "more entries than the limit of 100");
    // Descriptions of a megabyte each could be sent for ever: they are bytes, too.
    let record = [&b"9000 comment="[..], &[b'c'; 8986], b"\n"].concat();
    let described = [entry(b'x', "x", &record), entry(b'5', "x", b"")].concat();
    assert_eq!(read(&archive(std::slice::from_ref(&described))).unwrap().len(), 1);
    refused(&archive(&vec![described; 2]), "more bytes than");
    let record = entry(b'x', "x", b"29 size=18446744073709551615\n");
    refused(&archive(&[record, entry(b'0', "x", b"")]), "more bytes than");
}

// Every file that GNU tar describes (times of nanoseconds, long names) counted twice, so half as many were taken.
#[test]
fn extended_headers_are_not_entries() {
    let described = [entry(b'x', "x", b"18 mtime=1.500000\n"), entry(b'K', "", b"t\0"), entry(b'5', "x", b"")].concat();
    assert_eq!(read(&archive(&vec![described.clone(); 100])).unwrap().len(), 100);
    refused(&archive(&vec![described; 101]), "more entries than the limit of 100");
}

#[test]
fn a_truncated_archive_is_refused() {
    let whole = archive(&[entry(b'0', "x", &[1; 600]), entry(b'L', "", b"name\0"), entry(b'0', "y", b"yy")]);
    assert_eq!(read(&whole).unwrap().len(), 2);
    // The first block of zeros ends the archive.
    for length in (0..=whole.len() - 2 * BLOCK).step_by(64) {
        refused(&whole[..length], "it is truncated");
    }
    refused(b"", "it is truncated");
    refused(&[1; 2000], "not a tar archive");
}

#[test]
fn archives_of_gnu_tar_are_read_in_every_format() {
    let here = tempfile::tempdir().unwrap();
    let deep = "d".repeat(120);
    std::fs::create_dir_all(here.path().join(&deep)).unwrap();
    std::fs::write(here.path().join(&deep).join("file"), [9; 700]).unwrap();
    std::fs::write(here.path().join("new\nline"), "x").unwrap();
    std::os::unix::fs::symlink("t".repeat(130), here.path().join("link")).unwrap();
    for format in ["gnu", "oldgnu", "pax", "posix"] {
        let mut tar = std::process::Command::new("tar");
        let made = tar.args(["-c", "--format", format, "-C"]).arg(here.path()).arg(".").output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut all = read(&made.stdout).unwrap();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let kinds: Vec<_> = all.iter().map(|(name, kind, _)| (name.as_str(), kind.clone())).collect();
        let (dir, file) = (deep.clone(), format!("{deep}/file"));
        let expected = [
            ("", MemberKind::Directory),
            (&*dir, MemberKind::Directory),
            (&*file, MemberKind::File(700)),
            ("link", MemberKind::Symlink("t".repeat(130).into())),
            ("new\nline", MemberKind::File(1)),
        ];
        assert_eq!(kinds, expected, "{format}");
    }
}

#[test]
fn fuzz_tar_archive() {
    let seeds = [
        archive(&[
            entry(b'5', "a/", b""),
            entry(b'0', "./a//b", &[7; 513]),
            entry(b'L', "", b"q/r\0"),
            entry(b'0', "x", b"r"),
        ]),
        archive(&[entry(b'x', "x", b"15 path=long/x\n10 size=3\n"), entry(b'0', "short", b"abc")]),
    ];
    nido_fuzz::fuzz("tar", &seeds, |input| {
        let mut archive = Archive::new(input, LIMITS);
        let (mut members, mut bytes) = (0, 0);
        while let Ok(Some(member)) = archive.next() {
            assert_eq!(member.mode & !0o777, 0);
            assert!(
                member
                    .path
                    .iter()
                    .all(|part| ![&b""[..], b".", b".."].contains(&part.as_slice()) && !part.contains(&b'/'))
            );
            let mut content = Vec::new();
            if archive.read_to_end(&mut content).is_err() {
                break;
            }
            members += 1;
            bytes += content.len() as u64;
        }
        assert!(members <= LIMITS.entries && bytes <= LIMITS.bytes, "{members} members, {bytes} bytes");
    });
}
