//! From a `.metal` file to a shared object, cached by content.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::launch::Library;
use crate::{Error, Result, rewrite};

/// How to compile one `.metal` file.
pub struct Builder {
    path: PathBuf,
    text: Option<String>,
    kernels: Vec<String>,
    includes: Vec<PathBuf>,
    defines: Vec<String>,
    checked: bool,
}

impl Builder {
    /// Starts from a file.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Builder {
            path: path.as_ref().to_path_buf(),
            text: None,
            kernels: Vec::new(),
            includes: Vec::new(),
            defines: Vec::new(),
            checked: true,
        }
    }
    /// Starts from a source text; `name` stands for it in messages that its `#line` directives do not cover.
    pub fn from_source(name: &str, text: &str) -> Self {
        Builder { text: Some(text.to_string()), ..Builder::new(name) }
    }

    /// Compiles only these kernels (host names). Worth it for files with many instantiations.
    pub fn kernels(mut self, names: &[&str]) -> Self {
        self.kernels.extend(names.iter().map(|s| s.to_string()));
        self
    }
    /// Adds a folder to look for included files in.
    pub fn include(mut self, dir: impl AsRef<Path>) -> Self {
        self.includes.push(dir.as_ref().to_path_buf());
        self
    }
    /// Defines a macro, `NAME=VALUE`.
    pub fn define(mut self, name_value: &str) -> Self {
        self.defines.push(name_value.to_string());
        self
    }
    /// No memory checks and full optimisation, for large shapes. Divergence and barriers are
    /// still checked.
    pub fn fast(mut self) -> Self {
        self.checked = false;
        self
    }

    /// Preprocesses and rewrites; returns the C++ and the host names in the file.
    pub fn generate(&self) -> Result<(String, Vec<String>)> {
        let mut c = Command::new(cxx());
        c.args(["-E", "-x", "c++", "-std=c++17", "-undef", "-nostdinc", "-I"]);
        c.arg(cpp_dir().join("stubs")).arg("-include").arg(cpp_dir().join("msl_predef.h"));
        for i in &self.includes {
            c.arg("-I").arg(i);
        }
        for d in &self.defines {
            c.arg(format!("-D{d}"));
        }
        let text = match &self.text {
            None => run(c.arg(&self.path))?,
            Some(text) => {
                let file = cached_text(text, "metal")?;
                run(c.arg(file))?
            }
        };
        let only: Vec<&str> = self.kernels.iter().map(String::as_str).collect();
        let only = if only.is_empty() { None } else { Some(&only[..]) };
        rewrite::rewrite(&text, &self.path.to_string_lossy(), only, self.checked).map_err(Error)
    }

    /// Compiles and loads.
    pub fn compile(&self) -> Result<Library> {
        let (cpp, names) = self.generate()?;
        let so = self.shared_object(&cpp)?;
        Library::load(&so, names)
    }

    fn flags(&self) -> Vec<String> {
        let mut f: Vec<&str> = vec![
            "-std=c++17",
            "-g1",
            "-fPIC",
            "-fvisibility=hidden",
            "-w",
            "-Wno-narrowing",
            "-fno-strict-aliasing", // kernels reinterpret memory freely
            "-fsigned-char",        // MSL's char is signed everywhere
            "-fwrapv",
            "-ffp-contract=off",
            "-fno-exceptions",
            "-fno-rtti",
        ];
        // half must round after every operation
        f.extend(supported(&["-fexcess-precision=16", "-ffloat16-excess-precision=none"]));
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("f16c") {
            f.push("-mf16c");
        }
        if !self.checked {
            f.push("-O2");
        } else {
            f.extend([
                "-O1",
                "-fsanitize=thread", // only for the hooks: never linked with libtsan
                "-fsanitize=alignment,bounds,integer-divide-by-zero",
                "-fno-tree-vectorize",
                "-fno-tree-slp-vectorize",
            ]);
            // uninitialised private variables become loud garbage
            f.extend(supported(&["-ftrivial-auto-var-init=pattern"]));
        }
        f.iter().map(|s| s.to_string()).collect()
    }

    /// The compiled module; from the cache when nothing that goes into it has changed.
    fn shared_object(&self, cpp: &str) -> Result<PathBuf> {
        let dir = cache_dir();
        fs::create_dir_all(&dir).map_err(|e| Error(format!("{}: {e}", dir.display())))?;
        let read = |n: &str| fs::read_to_string(cpp_dir().join(n)).map_err(|e| Error(format!("{n}: {e}")));
        let common = (read("msl_abi.h")?, version());
        let rt_flags = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"];
        let rt = dir.join(format!("msl_rt-{:016x}.o", hash(&(&common, read("msl_rt.cpp")?, read("msl_fiber.h")?))));
        if !rt.exists() {
            build(&rt, |out| {
                let mut c = Command::new(cxx());
                c.args(rt_flags).arg("-c").arg(cpp_dir().join("msl_rt.cpp")).arg("-o").arg(out);
                c
            })?;
        }
        let flags = self.flags();
        let stem = self.path.file_stem().map_or("kernel".into(), |s| s.to_string_lossy().into_owned());
        let key = hash(&(&common, read("msl_stdlib.h")?, read("msl_types.h")?, &rt, cpp, &flags));
        let so = dir.join(format!("{stem}-{key:016x}.so"));
        if so.exists() {
            return Ok(so);
        }
        let source = cached_text(cpp, "cpp")?;
        let object = so.with_extension(format!("{}.o", unique()));
        build(&object, |out| {
            let mut c = Command::new(cxx());
            c.args(&flags).arg("-I").arg(cpp_dir()).arg("-c").arg(&source).arg("-o").arg(out);
            c
        })?;
        build(&so, |out| {
            let mut c = Command::new(cxx());
            c.arg("-shared").arg("-o").arg(out).arg(&object).arg(&rt).args(["-ldl", "-lm"]);
            c
        })?;
        fs::remove_file(&object).ok();
        Ok(so)
    }
}

/// A file in the cache with this text, named by its content.
fn cached_text(text: &str, extension: &str) -> Result<PathBuf> {
    let dir = cache_dir();
    let path = dir.join(format!("{:016x}.{extension}", hash(&text)));
    let tmp = path.with_extension(format!("{extension}{}", unique()));
    fs::create_dir_all(&dir)
        .and_then(|()| fs::write(&tmp, text))
        .and_then(|()| fs::rename(&tmp, &path))
        .map_err(|e| Error(format!("{}: {e}", path.display())))?;
    Ok(path)
}

/// Differs at every call, in this process and from others.
fn unique() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn cpp_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cpp")
}
fn cxx() -> String {
    std::env::var("MSL_CXX").unwrap_or_else(|_| "c++".into())
}
fn version() -> String {
    run(Command::new(cxx()).arg("--version")).unwrap_or_default() + &cxx()
}
fn hash(v: &impl Hash) -> u64 {
    let mut h = DefaultHasher::new();
    v.hash(&mut h);
    h.finish()
}
/// `target/<profile>/msl-cache` for a test binary; MSL_CPU_CACHE overrides it.
fn cache_dir() -> PathBuf {
    if let Ok(d) = std::env::var("MSL_CPU_CACHE") {
        return d.into();
    }
    let exe = std::env::current_exe().unwrap_or_default();
    match exe.parent() {
        Some(p) if p.ends_with("deps") => p.with_file_name("msl-cache"),
        _ => std::env::temp_dir().join("msl-cache"),
    }
}
fn run(c: &mut Command) -> Result<String> {
    let o = c.output().map_err(|e| Error(format!("cannot run {:?}: {e}", c.get_program())))?;
    if o.status.success() {
        return Ok(String::from_utf8_lossy(&o.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&o.stderr);
    let head: Vec<&str> = text.lines().take(40).collect();
    Err(Error(format!("{:?} failed:\n{}", c.get_program(), head.join("\n"))))
}
/// Builds into a temporary name and renames, so that parallel tests never see half a file.
fn build(target: &Path, command: impl FnOnce(&Path) -> Command) -> Result<()> {
    let tmp = target.with_extension(format!("tmp{}", unique()));
    run(&mut command(&tmp))?;
    fs::rename(&tmp, target).map_err(|e| Error(format!("{}: {e}", target.display())))
}
/// The flags among `flags` that the compiler knows.
fn supported<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    static KNOWN: Mutex<Vec<(String, bool)>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    flags
        .iter()
        .copied()
        .filter(|f| {
            if let Some(k) = known.iter().find(|k| k.0 == *f) {
                return k.1;
            }
            let ok = run(Command::new(cxx()).args(["-Werror", f, "-x", "c++", "-fsyntax-only", "/dev/null"])).is_ok();
            known.push((f.to_string(), ok));
            ok
        })
        .collect()
}
