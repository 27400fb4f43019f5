//! Model files, read by position.
//!
//! A mapped file that another program truncates kills the process at the next page that is gone (SIGBUS). Weights that a
//! stage copies anyway are therefore read with positioned reads, and a file that changes under them is an error that
//! names it. Only weights that a GPU reads in place are mapped.

use std::borrow::Cow;
use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::files::open_regular;

/// A regular file that is open for reading.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    file: File,
    opened: Identity,
    map: OnceLock<Arc<Mmap>>,
}

/// What tells that a file is still the one that was opened.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    len: u64,
    modified: Option<SystemTime>,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self { len: metadata.len(), modified: metadata.modified().ok() }
    }
}

impl ModelFile {
    /// Opens a regular, non-empty file.
    pub(super) fn open(path: &Path) -> Result<ModelFile> {
        let file = open_regular(path)?;
        let metadata = file.metadata().map_err(|error| Error::file(path, format!("cannot be read: {error}")))?;
        let opened = Identity::of(&metadata);
        if opened.len == 0 {
            return Err(Error::file(path, "the file is empty: the download has failed or is not complete"));
        }
        if usize::try_from(opened.len).is_err() {
            return Err(Error::file(path, format!("has {} bytes, more than this machine can address", opened.len)));
        }
        Ok(ModelFile { path: path.to_path_buf(), file, opened, map: OnceLock::new() })
    }

    /// The file's path, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file when it was opened.
    #[allow(clippy::len_without_is_empty)] // an empty file is not opened
    pub fn len(&self) -> usize {
        self.opened.len as usize // lossless: checked at opening
    }

    /// Fills `into` with the bytes from `offset` on. Fails when they are not there, or when the file has changed since
    /// it was opened.
    pub fn read_at(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, into, offset as u64).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => self.changed(),
            _ => Error::file(&self.path, format!("cannot be read at byte {offset}: {error}")),
        })?;
        match self.file.metadata() {
            Ok(metadata) if Identity::of(&metadata) == self.opened => Ok(()),
            Ok(_) => Err(self.changed()),
            Err(error) => Err(Error::file(&self.path, format!("cannot be read: {error}"))),
        }
    }

    /// Asks the system to begin reading these bytes. Threads that each read some rows at a time look like random access,
    /// and without this the disk would be read in small pieces.
    fn prefetch(&self, range: &Range<usize>) {
        #[cfg(target_os = "linux")]
        {
            use std::os::fd::AsRawFd;
            let (offset, len) = (range.start as libc::off_t, range.len() as libc::off_t);
            // SAFETY: The call takes an open descriptor and numbers; it touches no memory of this process.
            #[allow(unsafe_code)]
            let advised = unsafe { libc::posix_fadvise(self.file.as_raw_fd(), offset, len, libc::POSIX_FADV_WILLNEED) };
            if advised != 0 {
                tracing::debug!(advised, path = %self.path.display(), "the file is read without prefetching");
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// The first bytes of the file, at most `len`.
    pub(super) fn start(&self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len.min(self.len())];
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    /// The whole file in memory, mapped once. Reading the mapping after another program has truncated the file kills
    /// the process, which nothing here can prevent: a model in use has to be replaced by renaming, not overwritten.
    pub(super) fn map(&self) -> Result<Arc<Mmap>> {
        if let Some(map) = self.map.get() {
            return Ok(map.clone());
        }
        let map = map(&self.file).map_err(|error| Error::file(&self.path, format!("cannot be mapped: {error}")))?;
        if map.len() != self.len() {
            return Err(self.changed());
        }
        Ok(self.map.get_or_init(|| Arc::new(map)).clone())
    }

    fn changed(&self) -> Error {
        let Identity { len, .. } = self.opened;
        let reason = match self.file.metadata() {
            Ok(now) if now.len() != len => format!("had {len} bytes when it was opened and now has {}", now.len()),
            _ => "has changed since it was opened".to_string(),
        };
        Error::file(
            &self.path,
            format!("{reason}: another program is writing to it; load the model again when the file is complete"),
        )
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, into: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut into: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !into.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, into, offset) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                into = &mut into[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: The mapping is read-only and this crate never writes to model files. What remains is another program that
    // changes or truncates the file while it is mapped, see `ModelFile::map`.
    unsafe { Mmap::map(file) }
}

/// The bytes of a tensor: part of a file, or in memory.
#[derive(Debug, Clone)]
pub enum TensorBytes<'a> {
    /// Read from a file when asked for.
    File {
        /// The file.
        file: &'a ModelFile,
        /// The bytes in it.
        range: Range<usize>,
    },
    /// Already in memory.
    Memory(Cow<'a, [u8]>),
}

impl<'a> TensorBytes<'a> {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        match self {
            TensorBytes::File { range, .. } => range.len(),
            TensorBytes::Memory(bytes) => bytes.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Begins reading a file's bytes, before several threads read parts of them.
    pub fn prefetch(&self) {
        if let TensorBytes::File { file, range } = self {
            file.prefetch(range);
        }
    }

    /// Some of the bytes.
    ///
    /// # Panics
    /// Where `part` reaches beyond the end.
    pub fn part(&self, part: Range<usize>) -> TensorBytes<'_> {
        assert!(part.start <= part.end && part.end <= self.len(), "bytes {part:?} of {}", self.len());
        match self {
            TensorBytes::File { file, range } => {
                TensorBytes::File { file, range: range.start + part.start..range.start + part.end }
            }
            TensorBytes::Memory(bytes) => TensorBytes::Memory(Cow::Borrowed(&bytes[part])),
        }
    }

    /// Fills `into` with the bytes from `at` on.
    ///
    /// # Panics
    /// Where those reach beyond the end.
    pub fn read_at(&self, at: usize, into: &mut [u8]) -> Result<()> {
        assert!(at <= self.len() && into.len() <= self.len() - at, "{} bytes at {at} of {}", into.len(), self.len());
        match self {
            TensorBytes::File { file, range } => file.read_at(range.start + at, into),
            TensorBytes::Memory(bytes) => {
                into.copy_from_slice(&bytes[at..][..into.len()]);
                Ok(())
            }
        }
    }

    /// All bytes, in memory.
    pub fn read(&self) -> Result<Cow<'_, [u8]>> {
        match self {
            TensorBytes::File { file, range } => {
                let mut bytes = vec![0; range.len()];
                file.read_at(range.start, &mut bytes)?;
                Ok(Cow::Owned(bytes))
            }
            TensorBytes::Memory(bytes) => Ok(Cow::Borrowed(bytes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

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
            let message = ModelFile::open(path).unwrap_err().to_string();
            assert!(message.contains(path.to_str().unwrap()) && message.contains(reason), "{message}");
        }
    }

    #[test]
    fn parts_of_a_file_and_of_memory_read_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = ModelFile::open(&path).unwrap();
        assert_eq!(file.start(70).unwrap(), bytes[..70]);
        assert_eq!(file.start(usize::MAX).unwrap(), bytes);
        assert_eq!(file.map().unwrap()[..], bytes);
        let stored = TensorBytes::File { file: &file, range: 1000..90_000 };
        let memory = TensorBytes::Memory(Cow::Borrowed(&bytes[1000..90_000]));
        for tensor in [stored, memory] {
            assert_eq!(tensor.len(), 89_000);
            let part = tensor.part(10..80_010);
            assert_eq!(part.read().unwrap()[..], bytes[1010..81_010]);
            let mut some = [0; 300];
            part.read_at(79_700, &mut some).unwrap();
            assert_eq!(some, bytes[80_710..81_010]);
        }
    }

    #[test]
    fn a_file_that_changes_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, [7; 4096]).unwrap();
            // Written long ago, so that writing now shows whatever the file system's clock ticks.
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
            (ModelFile::open(&path).unwrap(), file)
        };
        let message = |file: &ModelFile| file.read_at(0, &mut [0; 64]).unwrap_err().to_string();

        let (file, writer) = open("truncated");
        file.read_at(4000, &mut [0; 96]).unwrap();
        writer.set_len(100).unwrap();
        for message in [message(&file), file.read_at(4000, &mut [0; 96]).unwrap_err().to_string()] {
            assert!(message.contains("truncated: had 4096 bytes when it was opened and now has 100"), "{message}");
        }
        assert!(file.map().unwrap_err().to_string().contains("now has 100"));

        let (file, mut writer) = open("overwritten");
        writer.rewind().unwrap();
        writer.write_all(&[8; 10]).unwrap();
        assert!(message(&file).contains("overwritten: has changed since it was opened"), "{}", message(&file));

        // A file that is replaced by renaming stays readable as it was.
        let (file, _) = open("replaced");
        std::fs::write(dir.path().join("new"), [9; 10]).unwrap();
        std::fs::rename(dir.path().join("new"), dir.path().join("replaced")).unwrap();
        let mut read = [0; 64];
        file.read_at(4032, &mut read).unwrap();
        assert_eq!(read, [7; 64]);
    }
}
