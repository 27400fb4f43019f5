//! A file of lines that a process killed at any moment leaves whole.
//!
//! One `write` a batch is not enough for that: on Linux a kill cuts a write short where it goes from one page of the file
//! to the next. So no line lies on two pages, and wherever a write is cut, a line has ended. What a page has left is filled
//! with spaces before the last line's end, or with a line that says nothing.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::WriteFailures;
use crate::error::{Error, Result};

/// Where writes may be cut. Larger pages begin at multiples of it too.
const PAGE: usize = 4096;

/// Bytes that are written at once when lines come fast. A write costs more than a page in it.
const BATCH: usize = 16 * PAGE;

/// With less than this left in a page after a write, it is filled: a filler must have room, and most lines.
const LEAST_ROOM: usize = 512;

/// Bytes at a file's beginning that are enough to tell what it is.
const HEAD: usize = 256;

/// What happens to a file that is there and not empty. One that holds something else is left alone.
#[derive(Debug, Clone, Copy)]
pub enum Existing<'a> {
    /// It is emptied, if this recognises its first bytes.
    Replaced(fn(&[u8]) -> bool),
    /// It is added to, if it begins like this.
    AddedTo(&'a [u8]),
}

/// A file of whole lines, for this process alone.
#[derive(Debug)]
pub struct LineFile {
    path: PathBuf,
    file: File,
    /// Bytes that are written.
    length: u64,
    /// Whole lines that are not.
    pending: Vec<u8>,
    pending_lines: u64,
    /// A line that says nothing, without its end.
    filler: Vec<u8>,
    failures: WriteFailures,
}

impl LineFile {
    /// Opens or creates the file, and counts in `failures` what cannot be written to it later. A piece of a line at its
    /// end, as a computer leaves that loses power, is cut off.
    pub fn open(path: &Path, existing: Existing<'_>, failures: WriteFailures) -> Result<LineFile> {
        let failed = |doing: &str, e: io::Error| Error::file(path, format!("cannot be {doing}: {e}"));
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(|e| failed("opened for writing", e))?;
        let regular = file.metadata().map_err(|e| failed("examined", e))?.is_file();
        // Where a file system has no locks one has to take care oneself.
        if regular && matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(Error::file(path, "another process or log writes to it; give each a file of its own"));
        }
        let mut length = 0;
        if regular {
            let head = head(&mut file).map_err(|e| failed("read", e))?;
            let known = match existing {
                Existing::Replaced(known) => known(&head),
                Existing::AddedTo(beginning) => head.starts_with(beginning),
            };
            if !head.is_empty() && !known {
                let foreign = "holds something else and is left as it is; give another name, or remove it";
                return Err(Error::file(path, foreign));
            }
            if let Existing::AddedTo(_) = existing {
                length = whole_lines(&mut file).map_err(|e| failed("read", e))?;
            }
            file.set_len(length).map_err(|e| failed("cut to whole lines", e))?;
        }
        let path = path.to_path_buf();
        let pending = Vec::with_capacity(BATCH);
        Ok(LineFile { path, file, length, pending, pending_lines: 0, filler: Vec::new(), failures })
    }

    /// The line that fills what a page has left, without its end.
    pub fn set_filler(&mut self, filler: Vec<u8>) {
        self.filler = filler;
    }

    /// Bytes, with those that are not written yet.
    pub fn length(&self) -> u64 {
        self.length + self.pending.len() as u64
    }

    /// Takes a line, without its end. It is written by [`flush`](Self::flush) at the latest.
    pub fn push(&mut self, line: &[u8]) {
        let needed = line.len() + 1;
        if needed > self.room() {
            if self.pending.is_empty() && self.room() < PAGE {
                self.pending.extend_from_slice(&self.filler);
                self.pending.push(b'\n');
            }
            self.fill();
            if self.pending.len() >= BATCH {
                self.write();
            }
        }
        self.pending.extend_from_slice(line);
        self.pending.push(b'\n');
        self.pending_lines += 1;
        // Lines behind one longer than a page begin on a page too. Only that it is whole after a kill cannot be promised.
        if needed > PAGE {
            self.fill();
        }
    }

    /// Writes what there is.
    pub fn flush(&mut self) {
        if !self.pending.is_empty() {
            if self.room() < LEAST_ROOM {
                self.fill();
            }
            self.write();
        }
    }

    /// Bytes that fit the page behind those that are there.
    fn room(&self) -> usize {
        PAGE - (self.length() % PAGE as u64) as usize
    }

    /// Fills the page with spaces before the last line's end.
    fn fill(&mut self) {
        let room = self.room();
        if room < PAGE && self.pending.pop().is_some() {
            self.pending.resize(self.pending.len() + room, b' ');
            self.pending.push(b'\n');
        }
    }

    /// One write, but for a disk that takes a part only.
    fn write(&mut self) {
        match self.file.write_all(&self.pending) {
            Ok(()) => self.length += self.pending.len() as u64,
            Err(error) => {
                // What a full disk took of the page goes again. Not every file can be cut.
                let _ = self.file.set_len(self.length);
                if self.failures.record(self.pending_lines, &error) {
                    let path = self.path.display();
                    tracing::warn!("{path}: cannot be written: {error}; further failures are only counted");
                }
            }
        }
        self.pending.clear();
        self.pending_lines = 0;
    }
}

/// The first bytes.
fn head(file: &mut File) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEAD);
    file.seek(SeekFrom::Start(0))?;
    Read::by_ref(file).take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// Bytes up to the last line's end.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut block = [0; PAGE];
    while end > 0 {
        let from = end.saturating_sub(PAGE as u64);
        let block = &mut block[..(end - from) as usize];
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(block)?;
        if let Some(newline) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(from + newline as u64 + 1);
        }
        end = from;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines().map(|line| line.trim_end().to_string()).filter(|line| line != "#" && !line.is_empty()).collect()
    }

    #[test]
    fn no_line_lies_on_two_pages_and_none_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let mut expected = Vec::new();
        for opening in 0..3 {
            let mut file = LineFile::open(&path, Existing::AddedTo(b"line"), WriteFailures::default()).unwrap();
            file.set_filler(b"#".to_vec());
            for n in 0..500_usize {
                let line = format!("line {opening} {n} x{}", "x".repeat(n * n * 31 % [200, 4000, 700][opening]));
                file.push(line.as_bytes());
                expected.push(line);
                if n % 3 == 0 {
                    file.flush();
                }
            }
            file.flush();
            assert_eq!(file.length(), path.metadata().unwrap().len());
        }
        assert!(lines(&path) == expected);
        let bytes = std::fs::read(&path).unwrap();
        for page in bytes.chunks_exact(4096) {
            assert_eq!(page[4095], b'\n');
        }
    }

    #[test]
    fn a_line_longer_than_a_page_is_written_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let mut file = LineFile::open(&path, Existing::Replaced(|_| false), WriteFailures::default()).unwrap();
        let long = "y".repeat(3 * PAGE);
        for line in ["a", &long, &"z".repeat(PAGE - 1), &"z".repeat(PAGE), "b"] {
            file.push(line.as_bytes());
        }
        file.flush();
        assert_eq!(lines(&path).iter().map(String::len).collect::<Vec<_>>(), [1, 3 * PAGE, PAGE - 1, PAGE, 1]);
    }

    #[test]
    fn a_torn_end_is_cut_off_and_a_foreign_file_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        std::fs::write(&path, format!("line 1\nline 2\nlin{}", "e".repeat(9000))).unwrap();
        let mut file = LineFile::open(&path, Existing::AddedTo(b"line"), WriteFailures::default()).unwrap();
        let second =
            LineFile::open(&path, Existing::AddedTo(b"line"), WriteFailures::default()).unwrap_err().to_string();
        assert!(second.contains("another process or log"), "{second}");
        file.push(b"line 3");
        file.flush();
        assert_eq!(lines(&path), ["line 1", "line 2", "line 3"]);
        let foreign = folder.path().join("letter");
        std::fs::write(&foreign, "Dear all").unwrap();
        let refused =
            LineFile::open(&foreign, Existing::AddedTo(b"line"), WriteFailures::default()).unwrap_err().to_string();
        assert!(refused.contains("letter") && refused.contains("something else"), "{refused}");
        assert_eq!(std::fs::read_to_string(&foreign).unwrap(), "Dear all");
        let numbers = Existing::Replaced(|head| head.starts_with(b"1,2"));
        let open = |name: &str| LineFile::open(&folder.path().join(name), numbers, WriteFailures::default());
        let missing = open("no/such").unwrap_err().to_string();
        assert!(missing.contains("no/such") && missing.contains("opened for writing"), "{missing}");
        assert!(open("letter").unwrap_err().to_string().contains("something else"));
        assert_eq!(std::fs::read_to_string(&foreign).unwrap(), "Dear all");
        std::fs::write(folder.path().join("numbers"), "1,2,3\n").unwrap();
        assert_eq!(open("numbers").unwrap().length(), 0, "its own kind is replaced");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_a_full_disk_does_not_take_is_counted() {
        let failures = WriteFailures::default();
        let mut file = LineFile::open(Path::new("/dev/full"), Existing::AddedTo(b"line"), failures.clone()).unwrap();
        for _ in 0..1000 {
            file.push(&[b'x'; 99]);
        }
        file.flush();
        assert_eq!((failures.count(), file.length()), (1000, 0));
        assert!(failures.first().unwrap().contains("No space left"), "{failures:?}");
    }
}
