//! From what a person calls a model to its files: a folder, a file, or a Hugging Face id that is downloaded when it is
//! not in the cache yet.

use std::path::{Path, PathBuf};

use super::safetensors::{ADAPTER, file_names, is_adapter};
use crate::error::{Error, Result};
use crate::files;

/// A model's files on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFiles {
    /// A folder with config.json, tokenizer and safetensors.
    HuggingFace {
        /// The folder.
        dir: PathBuf,
    },
    /// A GGUF file, which has everything in it.
    Gguf {
        /// The file.
        file: PathBuf,
    },
}

/// Finds a model. What exists on disk comes first: a folder that holds config.json or one GGUF file, or a GGUF file.
/// Otherwise `model` is a Hugging Face id: `org/name` or `org/name@revision` for the model's safetensors,
/// `org/name/file.gguf` for one GGUF file.
///
/// A model that is complete in the Hugging Face cache is used from there without asking the network. Anything else is
/// downloaded into it (feature `hub`), with progress bars when stderr is a terminal. Where the cache is, which server is
/// asked and with which token is decided by the `hf-hub` crate, as in every program that uses the cache.
pub fn locate(model: &str) -> Result<ModelFiles> {
    if let Some(files) = locate_on_disk(Path::new(model))? {
        return Ok(files);
    }
    match HubId::parse(model) {
        Some(id) => download(&id),
        None => Err(Error::file(
            model,
            "no such file or folder; a model on the Hugging Face hub is `org/name`, `org/name@revision` or \
             `org/name/file.gguf`",
        )),
    }
}

/// The model at a path; `None` when nothing is there.
fn locate_on_disk(path: &Path) -> Result<Option<ModelFiles>> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(Error::file(path, format!("cannot be read: {error}"))),
    };
    if metadata.is_dir() { in_folder(path).map(Some) } else { from_file(path).map(Some) }
}

fn in_folder(dir: &Path) -> Result<ModelFiles> {
    let files = file_names(dir)?;
    let ending = |ending: &str| files.iter().filter(|name| name.ends_with(ending)).collect::<Vec<_>>();
    let gguf = ending(".gguf");
    let has_config = files.iter().any(|name| name == "config.json");
    // GGUF repositories often keep the original's config.json.
    if has_config && (gguf.is_empty() || !ending(".safetensors").is_empty()) {
        return Ok(ModelFiles::HuggingFace { dir: dir.to_path_buf() });
    }
    match gguf[..] {
        [only] => Ok(ModelFiles::Gguf { file: dir.join(only) }),
        [] if files.iter().any(|name| is_adapter(name)) => Err(Error::file(dir, ADAPTER)),
        [] => Err(Error::file(dir, "is not a model folder: it has neither config.json nor a .gguf file")),
        ref several => {
            Err(Error::file(dir, format!("has several GGUF files, give the path of one: {}", list(several))))
        }
    }
}

fn from_file(path: &Path) -> Result<ModelFiles> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
    if name.ends_with(".gguf") || starts_with_gguf(path) {
        return Ok(ModelFiles::Gguf { file: path.to_path_buf() });
    }
    if is_adapter(name) {
        return Err(Error::file(path, ADAPTER));
    }
    if name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
        let dir = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        if dir.join("config.json").is_file() {
            return Ok(ModelFiles::HuggingFace { dir: dir.to_path_buf() });
        }
        return Err(Error::file(path, "has no config.json beside it: give a complete Hugging Face model folder"));
    }
    Err(Error::file(path, "is not a model: give a Hugging Face model folder or a .gguf file"))
}

/// Programs that keep models by their hash give them no ending.
fn starts_with_gguf(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0; 4];
    files::open_regular(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok()) && &magic == b"GGUF"
}

fn list<T: AsRef<str>>(names: &[T]) -> String {
    names.iter().map(|name| format!("`{}`", name.as_ref())).collect::<Vec<_>>().join(", ")
}

/// A model on the hub.
#[derive(Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
struct HubId<'a> {
    /// As the caller wrote it.
    model: &'a str,
    /// `org/name`.
    repo: String,
    revision: &'a str,
    /// The one GGUF file that is wanted.
    file: Option<&'a str>,
}

impl<'a> HubId<'a> {
    /// `None` for everything that looks like a path. The parts become folder names in the cache, so nothing passes that
    /// could lead out of it.
    fn parse(model: &'a str) -> Option<Self> {
        let (name, revision) = model.split_once('@').unwrap_or((model, "main"));
        let parts: Vec<&str> = name.split('/').collect();
        if !parts.iter().copied().chain(revision.split('/')).all(is_plain) {
            return None;
        }
        let (org, name, file) = match parts[..] {
            // Nobody ends a repository's name like this; a path to a file that is not there looks so.
            [_, name] if name.ends_with(".gguf") => return None,
            [org, name] => (org, name, None),
            [org, name, file] if file.ends_with(".gguf") => (org, name, Some(file)),
            _ => return None,
        };
        Some(HubId { model, repo: format!("{org}/{name}"), revision, file })
    }
}

/// Whether a part of a hub id consists of what the hub allows in one.
fn is_plain(part: &str) -> bool {
    !part.is_empty()
        && !part.starts_with('.')
        && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

#[cfg(not(feature = "hub"))]
fn download(id: &HubId<'_>) -> Result<ModelFiles> {
    Err(Error::Download {
        model: id.model.to_string(),
        reason: "this build does not download (feature `hub` is off), and there is no such file or folder here: \
                 download the model's folder or GGUF file and give its path"
            .to_string(),
    })
}

#[cfg(feature = "hub")]
use online::download;

#[cfg(feature = "hub")]
mod online {
    use std::collections::BTreeSet;
    use std::io::IsTerminal;
    use std::path::{Path, PathBuf};

    use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
    use hf_hub::{Cache, CacheRepo, Repo, RepoType};

    use super::super::safetensors::{ADAPTER, INDEX_FILE, Layout, SINGLE_FILE, file_names, is_adapter, read_index};
    use super::{HubId, ModelFiles, is_plain, list};
    use crate::error::{Error, Result};

    pub(super) fn download(id: &HubId<'_>) -> Result<ModelFiles> {
        // Both panic when neither HF_HOME nor a home folder says where the cache is.
        let environment = std::panic::catch_unwind(|| (Cache::from_env(), ApiBuilder::from_env()));
        let (cache, api) = environment.map_err(|_| failed(id, "the Hugging Face cache has no place: set HF_HOME"))?;
        cached_or_downloaded(id, &cache, api.with_progress(std::io::stderr().is_terminal()))
    }

    pub(super) fn cached_or_downloaded(id: &HubId<'_>, cache: &Cache, api: ApiBuilder) -> Result<ModelFiles> {
        let repo = Repo::with_revision(id.repo.clone(), RepoType::Model, id.revision.to_string());
        let named = cache.repo(repo.clone());
        if let Some(files) = cached(id, &named) {
            return Ok(files);
        }
        let api = api.build().map_err(|error| failed(id, error))?;
        let info = api.repo(repo).info().map_err(|error| request_failed(id, &error))?;
        if !is_plain(&info.sha) {
            return Err(failed(id, format!("the server gives `{}` for a commit", info.sha)));
        }
        let repo = Repo::with_revision(id.repo.clone(), RepoType::Model, info.sha.clone());
        let files = info.siblings.into_iter().map(|file| file.rfilename).filter(|name| is_plain(name)).collect();
        let snapshot = cache.repo(repo.clone()).pointer_path(&info.sha);
        let files = Download { id, api: api.repo(repo), snapshot, files }.run()?;
        // From now on the revision's name is found in the cache.
        let unwritable = |error| failed(id, format!("the cache cannot be written: {error}"));
        named.create_ref(&info.sha).map_err(unwritable)?;
        Ok(files)
    }

    /// The model as it lies complete in the cache.
    fn cached(id: &HubId<'_>, repo: &CacheRepo) -> Option<ModelFiles> {
        let wanted = id.file.unwrap_or("config.json");
        // A revision is a branch or tag that the cache has resolved before, or a commit.
        let file = repo.get(wanted).unwrap_or_else(|| repo.pointer_path(id.revision).join(wanted));
        if id.file.is_some() {
            return file.is_file().then_some(ModelFiles::Gguf { file });
        }
        let dir = file.parent()?.to_path_buf();
        is_complete(&dir).then_some(ModelFiles::HuggingFace { dir })
    }

    /// Whether a folder has a config, a tokenizer and all weights. Weights are downloaded last, so then nothing else
    /// is missing either.
    fn is_complete(dir: &Path) -> bool {
        dir.join("config.json").is_file()
            && file_names(dir).is_ok_and(|names| names.iter().any(|name| name.starts_with("tokenizer")))
            && Layout::find(dir).is_ok_and(|layout| layout.files().iter().all(|file| file.is_file()))
    }

    /// One download. It is tied to one commit, so that a push to the repository in between cannot mix two versions.
    struct Download<'a> {
        id: &'a HubId<'a>,
        api: ApiRepo,
        /// The commit's folder in the cache.
        snapshot: PathBuf,
        /// Names of the files at the repository's top.
        files: Vec<String>,
    }

    impl Download<'_> {
        fn run(self) -> Result<ModelFiles> {
            let gguf: Vec<&String> = self.files.iter().filter(|name| name.ends_with(".gguf")).collect();
            let weights: Vec<&String> = self.files.iter().filter(|name| is_weights(name)).collect();
            let is_folder = self.has("config.json") && !weights.is_empty();
            match (self.id.file, &gguf[..]) {
                (Some(file), _) if self.has(file) => Ok(ModelFiles::Gguf { file: self.get(file)? }),
                (Some(_), _) => Err(failed(self.id, format!("the repository has other files: {}", list(&gguf)))),
                (None, _) if is_folder => self.folder(&weights),
                (None, [only]) => Ok(ModelFiles::Gguf { file: self.get(only)? }),
                (None, []) if self.files.iter().any(|name| is_adapter(name)) => {
                    Err(failed(self.id, format!("the repository {ADAPTER}")))
                }
                (None, []) => Err(failed(
                    self.id,
                    "the repository has neither config.json with safetensors nor a GGUF file: take one that does, or \
                     convert the model and give the folder",
                )),
                (None, _) => Err(failed(
                    self.id,
                    format!("name one of the repository's files, as `{}/FILE`: {}", self.id.repo, list(&gguf)),
                )),
            }
        }

        fn folder(&self, weights: &[&String]) -> Result<ModelFiles> {
            for file in self.files.iter().filter(|name| is_description(name)) {
                self.get(file)?;
            }
            let shards = if self.has(SINGLE_FILE) {
                BTreeSet::from([SINGLE_FILE.to_string()])
            } else if self.has(INDEX_FILE) {
                read_index(&self.get(INDEX_FILE)?)?.into_values().collect()
            } else if let [only] = weights {
                BTreeSet::from([only.to_string()])
            } else {
                return Err(failed(self.id, format!("no {INDEX_FILE} says what these hold: {}", list(weights))));
            };
            for shard in &shards {
                self.get(shard)?;
            }
            Ok(ModelFiles::HuggingFace { dir: self.snapshot.clone() })
        }

        fn has(&self, name: &str) -> bool {
            self.files.iter().any(|file| file == name)
        }

        /// The file's path in the cache, where it is put if it is not there. An interrupted download is resumed.
        fn get(&self, file: &str) -> Result<PathBuf> {
            let path = self.snapshot.join(file);
            if path.is_file() {
                return Ok(path);
            }
            self.api.download(file).map_err(|error| request_failed(self.id, &error))
        }
    }

    /// What is needed beside the weights.
    fn is_description(name: &str) -> bool {
        matches!(name, "config.json" | "generation_config.json" | "special_tokens_map.json" | "chat_template.json")
            || name.starts_with("tokenizer")
            || name.ends_with(".jinja")
    }

    /// Weights under Hugging Face names; `consolidated` ones are the same under their maker's.
    fn is_weights(name: &str) -> bool {
        name.ends_with(".safetensors") && !name.starts_with("consolidated") && !is_adapter(name)
    }

    fn failed(id: &HubId<'_>, reason: impl std::fmt::Display) -> Error {
        Error::Download { model: id.model.to_string(), reason: reason.to_string() }
    }

    fn request_failed(id: &HubId<'_>, error: &ApiError) -> Error {
        let text = error.to_string();
        let what_to_do = if ["401", "403", "404"].iter().any(|status| text.ends_with(&format!("status: {status}"))) {
            "check the name and the revision; for a gated or private model accept its terms on the hub and log in with \
             `hf auth login`"
        } else {
            "check the network and try again (a download that broke off is resumed), or download the model's folder or \
             GGUF file elsewhere and give its path"
        };
        failed(id, format!("{text}; {what_to_do}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        let parse = |model| HubId::parse(model).map(|id| (id.repo, id.revision, id.file));
        assert_eq!(parse("org/name"), Some(("org/name".to_string(), "main", None)));
        assert_eq!(parse("org/Name-1.5_B@refs/pr/1"), Some(("org/Name-1.5_B".to_string(), "refs/pr/1", None)));
        assert_eq!(parse("org/name/a.Q4_K_M.gguf"), Some(("org/name".to_string(), "main", Some("a.Q4_K_M.gguf"))));
        assert_eq!(parse("org/name/a.gguf@v1"), Some(("org/name".to_string(), "v1", Some("a.gguf"))));
        for path in [
            "",
            "name",
            "/org/name",
            "./name",
            "../name",
            "~/name",
            "org/../name",
            "org/name/",
            "org/name@",
            "org/name@../../x",
            "org/name/config.json",
            "models/a.gguf",
            "org\\name",
            "C:\\models\\a.gguf",
            "a/b/c/d.gguf",
            "org/na me",
        ] {
            assert_eq!(parse(path), None, "{path}");
            let message = locate(path).unwrap_err().to_string();
            assert!(message.contains("no such file or folder"), "{message}");
        }
    }

    #[test]
    fn folders_and_files_on_disk() {
        let root = tempfile::tempdir().unwrap();
        let folder = |name: &str, files: &[&str]| {
            let dir = root.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            for file in files {
                let is_gguf = file.ends_with(".gguf") || file.starts_with("sha256");
                std::fs::write(dir.join(file), if is_gguf { "GGUF" } else { "text" }).unwrap();
            }
            dir
        };
        let found = |path: &Path| locate(path.to_str().unwrap());
        let hf = folder("hf", &["config.json", "model.safetensors", "extra.gguf", "readme.md"]);
        let hugging_face = ModelFiles::HuggingFace { dir: hf.clone() };
        for path in [hf.clone(), hf.join("config.json"), hf.join("model.safetensors")] {
            assert_eq!(found(&path).unwrap(), hugging_face);
        }
        let one = folder("one", &["config.json", "a.gguf"]);
        let gguf = ModelFiles::Gguf { file: one.join("a.gguf") };
        assert_eq!(found(&one).unwrap(), gguf);
        assert_eq!(found(&one.join("a.gguf")).unwrap(), gguf);
        let blob = folder("blobs", &["sha256-1"]).join("sha256-1");
        assert_eq!(found(&blob).unwrap(), ModelFiles::Gguf { file: blob });

        let lone = folder("lone", &["model.safetensors", "notes.txt"]);
        for (path, reason) in [
            (folder("several", &["a.gguf", "b.gguf"]), "`a.gguf`, `b.gguf`"),
            (folder("none", &["readme.md"]), "neither config.json nor a .gguf file"),
            (lone.join("model.safetensors"), "no config.json beside it"),
            (lone.join("notes.txt"), "is not a model"),
        ] {
            let message = found(&path).unwrap_err().to_string();
            assert!(message.contains(path.to_str().unwrap()) && message.contains(reason), "{message}");
        }
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn without_the_feature_the_error_says_what_to_do() {
        let message = locate("org/name").unwrap_err().to_string();
        assert!(message.contains("`org/name`") && message.contains("feature `hub`"), "{message}");
    }

    #[cfg(feature = "hub")]
    mod downloads {
        use std::io::{BufRead, BufReader, Write};
        use std::net::TcpListener;
        use std::sync::{Arc, Mutex};

        use hf_hub::Cache;
        use hf_hub::api::sync::ApiBuilder;

        use super::*;
        use crate::weights::hub::online::cached_or_downloaded;

        const COMMIT: &str = "0123abcd";

        /// A server that answers as the hub does for one repository. Returns its address and the list of the paths that
        /// it was asked for.
        fn serve(files: Vec<(&'static str, Vec<u8>)>) -> (String, Arc<Mutex<Vec<String>>>) {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let asked = Arc::new(Mutex::new(Vec::new()));
            let log = asked.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let (mut path, mut from, mut to) = (String::new(), 0, None);
                    for line in BufReader::new(&stream).lines() {
                        let line = line.unwrap().to_ascii_lowercase();
                        if let Some(rest) = line.strip_prefix("get ") {
                            path = rest.split(' ').next().unwrap().to_string();
                        } else if let Some(range) = line.strip_prefix("range: bytes=") {
                            let (start, end) = range.split_once('-').unwrap();
                            from = start.parse::<usize>().unwrap();
                            to = end.parse::<usize>().ok().map(|end| end + 1);
                        } else if line.is_empty() {
                            break;
                        }
                    }
                    log.lock().unwrap().push(path.clone());
                    let file = path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/"));
                    let file = file.and_then(|name| files.iter().find(|(file, _)| *file == name));
                    let (head, body) = if path == "/api/models/org/name/revision/main" {
                        let names = files.iter().map(|(name, _)| format!("{{\"rfilename\": \"{name}\"}}"));
                        let names = names.collect::<Vec<_>>().join(",");
                        ("200 OK".into(), format!("{{\"siblings\": [{names}], \"sha\": \"{COMMIT}\"}}").into_bytes())
                    } else if let Some((name, bytes)) = file {
                        let part = &bytes[from..to.unwrap_or(bytes.len()).min(bytes.len())];
                        let head = format!(
                            "206 Partial Content\r\netag: \"{name}\"\r\nx-repo-commit: {COMMIT}\r\n\
                             content-range: bytes {from}-{}/{}",
                            from + part.len() - 1,
                            bytes.len()
                        );
                        (head, part.to_vec())
                    } else {
                        ("404 Not Found".into(), Vec::new())
                    };
                    let length = body.len();
                    let head = format!("HTTP/1.1 {head}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
                    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).unwrap();
                }
            });
            (address, asked)
        }

        fn get(model: &str, cache: &Path, address: &str) -> Result<ModelFiles> {
            let cache = Cache::new(cache.to_path_buf());
            let api = ApiBuilder::from_cache(cache.clone()).with_endpoint(address.to_string()).with_progress(false);
            cached_or_downloaded(&HubId::parse(model).unwrap(), &cache, api)
        }

        #[test]
        fn a_folder_is_downloaded_once_and_only_what_is_needed() {
            let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
            let files = [
                ".gitattributes",
                "readme.md",
                "config.json",
                "tokenizer.json",
                "chat_template.jinja",
                "consolidated.safetensors",
                "model-1.safetensors",
                "model-2.safetensors",
                "original/model.safetensors",
                "pytorch_model.bin",
            ];
            let mut files: Vec<(&str, Vec<u8>)> = files.map(|name| (name, name.as_bytes().to_vec())).to_vec();
            files.push(("model.safetensors.index.json", index.as_bytes().to_vec()));
            let (address, asked) = serve(files);
            let cache = tempfile::tempdir().unwrap();
            let found = get("org/name", cache.path(), &address).unwrap();
            let ModelFiles::HuggingFace { dir } = found.clone() else { panic!("{found:?}") };
            let expected = [
                "chat_template.jinja",
                "config.json",
                "model-1.safetensors",
                "model-2.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json",
            ];
            assert_eq!(file_names(&dir).unwrap(), expected);
            assert_eq!(std::fs::read(dir.join("model-2.safetensors")).unwrap(), b"model-2.safetensors");

            // Complete: found again by name and by commit, without the server.
            let requests = asked.lock().unwrap().len();
            assert_eq!(get("org/name", cache.path(), &address).unwrap(), found);
            assert_eq!(get(&format!("org/name@{COMMIT}"), cache.path(), &address).unwrap(), found);
            assert_eq!(asked.lock().unwrap().len(), requests);

            // A shard is gone: that one and nothing else is fetched again.
            std::fs::remove_file(dir.join("model-2.safetensors")).unwrap();
            assert_eq!(get("org/name", cache.path(), &address).unwrap(), found);
            let asked = asked.lock().unwrap()[requests..].join(" ");
            assert!(asked.contains("model-2.safetensors") && !asked.contains("model-1.safetensors"), "{asked}");
        }

        #[test]
        fn one_gguf_file_is_downloaded_and_a_wrong_name_lists_them() {
            let (address, _) = serve(vec![("a.gguf", b"GGUF a".to_vec()), ("b.gguf", b"GGUF b".to_vec())]);
            let cache = tempfile::tempdir().unwrap();
            let ModelFiles::Gguf { file } = get("org/name/b.gguf", cache.path(), &address).unwrap() else { panic!() };
            assert_eq!(std::fs::read(file).unwrap(), b"GGUF b");
            for model in ["org/name", "org/name/c.gguf"] {
                let message = get(model, cache.path(), &address).unwrap_err().to_string();
                assert!(message.contains(model) && message.contains("`a.gguf`, `b.gguf`"), "{message}");
            }
        }

        #[test]
        fn failures_say_what_to_do() {
            let (address, _) = serve(vec![("config.json", b"{}".to_vec()), ("pytorch_model.bin", b"x".to_vec())]);
            let cache = tempfile::tempdir().unwrap();
            let message = |model, address: &str| get(model, cache.path(), address).unwrap_err().to_string();
            let no_weights = message("org/name", &address);
            assert!(no_weights.contains("neither config.json with safetensors"), "{no_weights}");
            let absent = message("org/absent", &address);
            assert!(
                absent.contains("`org/absent`") && absent.contains("404") && absent.contains("hf auth login"),
                "{absent}"
            );
            let offline = message("org/name", "http://127.0.0.1:1");
            assert!(offline.contains("check the network"), "{offline}");
        }
    }
}
