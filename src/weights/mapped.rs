//! Mapping a file into memory and handing its pages back.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps a regular, non-empty file for reading.
pub(super) fn map_file(path: &Path) -> Result<Mmap> {
    let unreadable = |error: std::io::Error| Error::file(path, format!("cannot be read: {error}"));
    // Asked before opening, since opening a named pipe would wait for its writer.
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    if metadata.len() == 0 {
        return Err(Error::file(path, "the file is empty: the download has failed or is not complete"));
    }
    map(&File::open(path).map_err(unreadable)?).map_err(unreadable)
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: The mapping is read-only and this crate never writes to model files. What remains is another program that
    // changes or truncates the file while it is mapped; every reader of mapped weights shares that condition, and
    // programs that replace a model (downloads among them) write a new file and rename it.
    unsafe { Mmap::map(file) }
}

/// The granularity of releasing: a multiple of the page size. Only x86 has one page size everywhere; elsewhere the
/// largest in use stands for all, so that no page is touched that is not wholly inside.
const RELEASE_UNIT: usize = if cfg!(any(target_arch = "x86", target_arch = "x86_64")) { 4 << 10 } else { 64 << 10 };

/// Takes the pages that lie wholly within `range` out of this process. They come back from the file when touched.
pub(super) fn release_pages(map: &Mmap, range: Range<usize>) {
    let start = range.start.checked_next_multiple_of(RELEASE_UNIT).unwrap_or(usize::MAX);
    let end = range.end.min(map.len()) / RELEASE_UNIT * RELEASE_UNIT;
    if start < end {
        drop_pages(map, start, end - start);
    }
}

#[cfg(unix)]
#[allow(unsafe_code)]
fn drop_pages(map: &Mmap, offset: usize, len: usize) {
    // SAFETY: MADV_DONTNEED discards what was written to private pages and nothing else. This mapping is of a file and
    // read-only, so a discarded page reads the same bytes again, also through slices that are alive now.
    let advised = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, len) };
    // A refusal costs memory and nothing else.
    if let Err(error) = advised {
        tracing::debug!(%error, offset, len, "pages were not released");
    }
}

#[cfg(not(unix))]
fn drop_pages(_map: &Mmap, _offset: usize, _len: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_or_missing_file_and_a_folder_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty.gguf");
        std::fs::write(&empty, b"").unwrap();
        for (path, reason) in [
            (empty.as_path(), "empty"),
            (dir.path(), "regular file"),
            (&dir.path().join("absent.gguf"), "cannot be read"),
        ] {
            let message = map_file(path).unwrap_err().to_string();
            assert!(message.contains(path.to_str().unwrap()) && message.contains(reason), "{message}");
        }
    }

    #[test]
    fn released_pages_read_the_same_bytes_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = map_file(&path).unwrap();
        let slice = &map[10..290_000];
        release_pages(&map, 10..290_000);
        assert_eq!(slice, &bytes[10..290_000]);
        release_pages(&map, 5..6);
        release_pages(&map, 0..usize::MAX / RELEASE_UNIT * RELEASE_UNIT);
        release_pages(&map, usize::MAX - 1..usize::MAX);
        assert_eq!(&map[..], &bytes[..]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn released_pages_leave_the_process() {
        let resident_kib = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<i64>().unwrap()
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1u8; 64 << 20]).unwrap();
        let map = map_file(file.path()).unwrap();
        assert_eq!(map.iter().map(|&byte| u64::from(byte)).sum::<u64>(), 64 << 20);
        let before = resident_kib();
        release_pages(&map, 100..map.len() - 100);
        let released = before - resident_kib();
        assert!(released > 48 << 10, "{released} KiB of 64 MiB were released");
    }
}
