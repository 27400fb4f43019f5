//! The module order of lib.rs is the reading order: a module uses only those above it.

use std::path::{Path, PathBuf};

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(sources(&path)),
            false => found.extend(path.extension().is_some_and(|e| e == "rs").then_some(path)),
        }
    }
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Module names in the order of lib.rs.
fn modules() -> Vec<String> {
    let lib = std::fs::read_to_string(root().join("lib.rs")).unwrap();
    let modules = lib.lines().filter_map(|line| {
        let line = line.strip_prefix("pub(crate) ").or_else(|| line.strip_prefix("pub "))?;
        line.strip_prefix("mod ")?.strip_suffix(';')
    });
    let modules: Vec<String> = modules.map(str::to_string).collect();
    assert!(modules.len() >= 8, "{modules:?}");
    modules
}

/// Sources of a module: `name.rs` or the folder `name`.
fn sources_of(module: &str) -> Vec<PathBuf> {
    let file = root().join(format!("{module}.rs"));
    if file.exists() { vec![file] } else { sources(&root().join(module)) }
}

#[test]
fn a_module_uses_only_those_above_it() {
    let modules = modules();
    let mut wrong = Vec::new();
    for (index, module) in modules.iter().enumerate() {
        for path in sources_of(module) {
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            for (number, line) in code.enumerate() {
                for below in &modules[index + 1..] {
                    if line.contains(&format!("crate::{below}::")) {
                        wrong.push(format!("{} uses {below} (code line {number})", path.display()));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn kernels_are_no_public_module() {
    let lib = std::fs::read_to_string(root().join("lib.rs")).unwrap();
    assert!(lib.lines().any(|line| line == "pub(crate) mod kernels;"), "kernels are public");
    assert!(modules().contains(&"kernels".to_string()));
}

#[test]
fn unsafe_stands_only_in_kernels_and_where_files_are_mapped() {
    let mut wrong = Vec::new();
    for path in sources(&root()) {
        let text = std::fs::read_to_string(&path).unwrap();
        let allowed = path.starts_with(root().join("kernels")) || path.ends_with("weights/file.rs");
        let found = text.lines().any(|line| {
            let line = line.trim_start();
            !line.starts_with("//")
                && (line.contains("unsafe {") || line.contains("unsafe fn") || line.contains("unsafe impl"))
        });
        if found && !allowed {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn the_library_reads_no_environment_variable() {
    for path in sources(&root()) {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("env::var"), "{}", path.display());
    }
}

/// The executor speaks to stages by messages; `pipeline/stages.rs` starts them.
#[test]
fn the_executor_opens_no_device_and_builds_no_stage() {
    let theirs = ["OpenDevice", "StageBackend", "StageSource", "Worker", "Link", "Activations", "Tensor"];
    let mut wrong = Vec::new();
    for path in sources(&root().join("executor")) {
        let text = std::fs::read_to_string(&path).unwrap();
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with("//")) {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            if let Some(word) = words.find(|word| theirs.contains(word)) {
                wrong.push(format!("{} names {word}: {line}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
