//! Flattens the kernels named by each manifest `kernels/NAME.sources` into one source, writes the Rust side of their
//! parameter structs, and compiles them where that is asked for and possible.
//!
//! A manifest lists files relative to its own folder, one a line; `//` begins a comment. `#line` directives keep the
//! compiler's messages pointing at the files. A struct in a file that ends in `_params.metal` is written once, there: its
//! fields become a Rust struct of the same layout.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let folder = Path::new("kernels");
    println!("cargo:rerun-if-changed=kernels");
    let mut manifests: Vec<PathBuf> = fs::read_dir(folder)
        .expect("metal-ext/kernels is part of the crate")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sources"))
        .collect();
    manifests.sort();

    let mut parameters = BTreeSet::new();
    let mut libraries = String::new();
    for manifest in &manifests {
        let name = manifest.file_stem().expect("a manifest has a name").to_string_lossy().into_owned();
        let mut flat = String::from("#include <metal_stdlib>\nusing namespace metal;\n");
        for file in listed(manifest) {
            let text = read(&file);
            let shown = file.strip_prefix(folder).expect("sources lie in the folder").display();
            let _ = writeln!(flat, "#line 1 \"{shown}\"");
            flat.push_str(&text);
            if file.to_string_lossy().ends_with("_params.metal") {
                parameters.insert(file);
            }
        }
        let source = out.join(format!("{name}.metal"));
        fs::write(&source, flat).expect("OUT_DIR can be written");
        let metallib = precompiled(&source);
        let _ = writeln!(
            libraries,
            "#[allow(unused_macros)] macro_rules! {name}_metallib {{ () => {{ {} }} }}\npub(crate) use {name}_metallib;",
            metallib.map_or("None".into(), |path| format!("Some(include_bytes!({path:?}).as_slice())")),
        );
    }
    fs::write(out.join("metallibs.rs"), libraries).expect("OUT_DIR can be written");
    let structs: String = parameters.iter().map(|file| rust_struct(file)).collect();
    fs::write(out.join("params.rs"), structs).expect("OUT_DIR can be written");
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The files of a manifest.
fn listed(manifest: &Path) -> Vec<PathBuf> {
    let folder = manifest.parent().expect("a file has a folder");
    read(manifest)
        .lines()
        .map(|line| line.split("//").next().unwrap_or("").trim())
        .filter(|line| !line.is_empty())
        .map(|line| folder.join(line))
        .collect()
}

/// `xcrun metal` and `metallib` over one flattened source; `None` where the feature is off or Xcode is not there, and
/// the source is compiled at run time.
fn precompiled(source: &Path) -> Option<PathBuf> {
    if env::var_os("CARGO_FEATURE_BUILT_KERNELS").is_none() || env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("macos")
    {
        return None;
    }
    let (air, metallib) = (source.with_extension("air"), source.with_extension("metallib"));
    let run = |arguments: &[&std::ffi::OsStr]| {
        let ran = Command::new("xcrun").args(["-sdk", "macosx"]).args(arguments).output();
        match ran {
            Ok(output) if output.status.success() => true,
            Ok(output) => {
                println!("cargo:warning={}: {}", source.display(), String::from_utf8_lossy(&output.stderr).trim());
                false
            }
            Err(_) => false,
        }
    };
    // As at run time: infinities and NaN stay what they are, which the compiler would otherwise take for impossible.
    let options = ["metal", "-std=metal3.0", "-fno-fast-math", "-c"].map(std::ffi::OsStr::new);
    let compile: Vec<_> = options.into_iter().chain([source.as_ref(), "-o".as_ref(), air.as_ref()]).collect();
    let compiled = run(&compile) && run(&["metallib".as_ref(), air.as_ref(), "-o".as_ref(), metallib.as_ref()]);
    if !compiled {
        println!("cargo:warning=no precompiled {}: it is compiled when first used", source.display());
    }
    compiled.then_some(metallib)
}

/// The Rust twin of `struct Name { uint field; // meaning ... };`, whose fields all have four bytes.
fn rust_struct(path: &Path) -> String {
    let text = read(path);
    let wrong = |line: &str| -> ! { panic!("{}: cannot read `{line}`", path.display()) };
    let mut out = String::new();
    let mut fields: Vec<String> = Vec::new();
    for line in text.lines().map(str::trim) {
        let (code, comment) = line.split_once("//").map_or((line, ""), |(code, comment)| (code.trim(), comment.trim()));
        if let Some(name) = code.strip_prefix("struct ") {
            let name = name.trim_end_matches('{').trim();
            let _ = writeln!(
                out,
                "/// Parameters of kernels; the fields stand in `kernels/{}`.\n#[repr(C)]\n#[derive(Debug, Clone, Copy, Default, PartialEq)]\npub struct {name} {{",
                path.file_name().expect("a file").to_string_lossy()
            );
        } else if code == "};" {
            let bytes: String = fields
                .iter()
                .map(|field| format!("        bytes.extend_from_slice(&self.{field}.to_le_bytes());\n"))
                .collect();
            let name =
                out.rsplit("pub struct ").next().and_then(|rest| rest.split(' ').next()).unwrap_or("").to_string();
            let _ = writeln!(
                out,
                "}}\n\nimpl {name} {{\n    /// The bytes that a kernel is given.\n    pub fn to_bytes(&self) -> Vec<u8> {{\n        let mut bytes = Vec::with_capacity(size_of::<Self>());\n{bytes}        bytes\n    }}\n}}\n"
            );
            fields.clear();
        } else if !code.is_empty() {
            let Some((kind, field)) = code.trim_end_matches(';').split_once(' ') else { wrong(line) };
            let rust = match kind {
                "uint" => "u32",
                "int" => "i32",
                "float" => "f32",
                _ => wrong(line),
            };
            let _ = writeln!(out, "    /// {comment}\n    pub {field}: {rust},");
            fields.push(field.to_string());
        }
    }
    out
}
