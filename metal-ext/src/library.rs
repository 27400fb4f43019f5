//! The kernels as they travel with the crate: sources, or what Apple's compiler made of them at build time.

/// The kernels of one manifest.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct KernelLibrary {
    /// The manifest's name.
    pub name: &'static str,
    /// The flattened source. Absent where a compiled library is there and the feature `src_kernels` is off.
    pub source: Option<&'static str>,
    /// The compiled library, where the feature `built_kernels` is on and Xcode was present.
    pub metallib: Option<&'static [u8]>,
}

include!(concat!(env!("OUT_DIR"), "/metallibs.rs"));

/// The library of the manifest `kernels/NAME.sources`: compiled or as source, as the features and the machine that built
/// the crate have it.
macro_rules! kernel_lib {
    ($name:literal, $metallib:ident) => {{
        const METALLIB: Option<&[u8]> = $crate::library::$metallib!();
        $crate::library::KernelLibrary {
            name: $name,
            source: match cfg!(feature = "src_kernels") || METALLIB.is_none() {
                true => Some(include_str!(concat!(env!("OUT_DIR"), "/", $name, ".metal"))),
                false => None,
            },
            metallib: METALLIB,
        }
    }};
}
pub(crate) use kernel_lib;
