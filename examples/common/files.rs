//! Files that flags name: texts that are read, and outputs that replace nothing but outputs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// Bytes of a text at most. A prompt of a million tokens has a tenth of it.
const MOST_TEXT: u64 = 64 << 20;

/// Reads a text: a regular file, or standard input as `-`. Pipes and devices are refused, since they may never end, or
/// never begin.
pub fn read_text(path: &Path) -> Result<String> {
    match path.to_str() {
        Some("-") => bounded(io::stdin().lock()),
        _ => bounded(regular(path)?),
    }
}

fn regular(path: &Path) -> Result<File> {
    // Before it is opened: opening a pipe waits for who writes to it.
    let metadata = fs::metadata(path)?;
    ensure!(metadata.is_file(), "not a regular file; give - to read standard input");
    Ok(File::open(path)?)
}

fn bounded(input: impl Read) -> Result<String> {
    let mut bytes = Vec::new();
    input.take(MOST_TEXT + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= MOST_TEXT, "longer than {} MiB", MOST_TEXT >> 20);
    String::from_utf8(bytes).context("not text in UTF-8")
}

/// A file that a program writes at its end. What is there must be an earlier output of the same kind, or empty: a name that
/// was mistyped must not cost a model.
#[derive(Debug)]
pub struct OutputFile {
    flag: &'static str,
    path: PathBuf,
    /// Recognises the first bytes of an output.
    known: fn(&[u8]) -> bool,
}

/// Bytes that [`OutputFile::known`] is shown.
const HEAD: u64 = 4096;

impl OutputFile {
    /// Checks at the program's beginning that the file can be written at its end.
    pub fn new(flag: &'static str, path: &Path, known: fn(&[u8]) -> bool) -> Result<OutputFile> {
        let file = OutputFile { flag, path: path.to_path_buf(), known };
        match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // Nothing stays behind if the program fails before it writes.
                file.named(File::create_new(path).map(drop).and_then(|()| fs::remove_file(path)))?;
            }
            _ => drop(file.open()?),
        }
        Ok(file)
    }

    /// Writes the file.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        self.named(self.begin()?.write_all(bytes))
    }

    /// The file, emptied, for a program that writes it bit by bit.
    pub fn begin(&self) -> Result<File> {
        let file = self.open()?;
        if self.named(file.metadata())?.is_file() {
            self.named(file.set_len(0))?;
        }
        Ok(file)
    }

    /// Opens it for writing, if it is not something else.
    fn open(&self) -> Result<File> {
        if self.path.is_file() {
            let mut head = Vec::new();
            let read = File::open(&self.path).and_then(|file| file.take(HEAD).read_to_end(&mut head));
            self.named(read)?;
            if !head.is_empty() && !(self.known)(&head) {
                let (flag, path) = (self.flag, self.path.display());
                bail!(
                    "{flag} {path}: the file holds something else and is left as it is; give another name, or remove it"
                );
            }
        }
        self.named(OpenOptions::new().write(true).create(true).truncate(false).open(&self.path))
    }

    fn named<T>(&self, result: io::Result<T>) -> Result<T> {
        result.with_context(|| format!("{} {}: cannot be written", self.flag, self.path.display()))
    }
}
