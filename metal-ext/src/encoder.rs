//! The seam between deciding what to dispatch and dispatching it. A [`Dispatch`] is plain data: a kernel, its arguments,
//! a grid. An [`Encoder`] takes it to a GPU, to the CPU (the test crate `msl-cpu`), or into a list ([`DryRun`]).
//!
//! An argument names the bytes that the kernel may touch. The CPU encoder lets it touch those and no others, the dry run
//! adds them up, and Metal orders dispatches by them: one statement, three uses.

use crate::error::Result;
use crate::library::KernelLibrary;

/// Takes dispatches in order. Each sees what the ones before it wrote.
pub trait Encoder {
    /// Memory that kernels work on.
    type Buffer;

    /// Encodes one dispatch.
    fn dispatch(&mut self, dispatch: &Dispatch<'_, Self::Buffer>) -> Result<()>;
}

/// Part of a buffer that a kernel may touch.
#[derive(Debug)]
pub struct Region<'a, B> {
    /// The buffer.
    pub buffer: &'a B,
    /// Where the kernel's pointer points, in bytes.
    pub offset: usize,
    /// Bytes from there that the kernel may touch.
    pub span: usize,
    /// Bytes that it does touch, or read where it also writes some; less than `span` where it steps over some.
    pub touched: usize,
}

// Not derived: that would ask for `B: Clone`, and a region only refers to a buffer.
impl<B> Clone for Region<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Region<'_, B> {}

impl<'a, B> Region<'a, B> {
    /// `span` bytes from `offset`, all of them touched.
    pub fn new(buffer: &'a B, offset: usize, span: usize) -> Self {
        Region { buffer, offset, span, touched: span }
    }

    /// The region from the start of the buffer, of no length yet: for those that are told where a thing lies and work out
    /// how long it is.
    pub fn at(buffer: &'a B, offset: usize) -> Self {
        Region::new(buffer, offset, 0)
    }

    /// The same place, `bytes` further on.
    pub fn after(self, bytes: usize) -> Self {
        Region { offset: self.offset + bytes, ..self }
    }

    /// The same place with this length, all of it touched.
    pub fn spanning(self, span: usize) -> Self {
        Region { span, touched: span, ..self }
    }

    /// The same region of which only `touched` bytes are read or written.
    pub fn touching(self, touched: usize) -> Self {
        Region { touched, ..self }
    }

    /// `rows` rows of `width` bytes, `stride` bytes apart.
    pub fn rows(self, rows: usize, width: usize, stride: usize) -> Self {
        self.spanning(rows.saturating_sub(1) * stride + width).touching(rows * width)
    }
}

/// One entry of a kernel's buffer table.
#[derive(Debug, Clone)]
pub enum Argument<'a, B> {
    /// A region that is read.
    Read(Region<'a, B>),
    /// A region that is written without being read.
    Write(Region<'a, B>),
    /// A region that is read, and of which this many bytes are written.
    Update(Region<'a, B>, usize),
    /// A few constant bytes, at most 4 KiB.
    Bytes(Vec<u8>),
}

/// The value of a function constant. Kernels declare no other types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Constant {
    /// `bool`
    Bool(bool),
    /// `ushort`
    Ushort(u16),
}

/// A kernel and all that it is given.
#[derive(Debug, Clone)]
pub struct Dispatch<'a, B> {
    /// Where the kernel is.
    pub library: &'static KernelLibrary,
    /// Its host name.
    pub kernel: String,
    /// Function constants by index.
    pub constants: Vec<(u16, Constant)>,
    /// The buffer table: index and entry. What a function constant switches off is left out.
    pub arguments: Vec<(u32, Argument<'a, B>)>,
    /// Lengths of `[[threadgroup(n)]]` arguments in bytes, multiples of 16.
    pub threadgroup_memory: Vec<(u32, usize)>,
    /// Threadgroups in each direction.
    pub threadgroups: [u32; 3],
    /// Threads of a threadgroup in each direction.
    pub threads: [u32; 3],
}

impl<'a, B> Dispatch<'a, B> {
    /// A dispatch of one thread without arguments.
    pub fn new(library: &'static KernelLibrary, kernel: impl Into<String>) -> Self {
        Dispatch {
            library,
            kernel: kernel.into(),
            constants: Vec::new(),
            arguments: Vec::new(),
            threadgroup_memory: Vec::new(),
            threadgroups: [1, 1, 1],
            threads: [1, 1, 1],
        }
    }

    /// Sets a function constant.
    pub fn constant(mut self, index: u16, value: Constant) -> Self {
        self.constants.push((index, value));
        self
    }

    /// Binds a region that is read.
    pub fn read(mut self, index: u32, region: Region<'a, B>) -> Self {
        self.arguments.push((index, Argument::Read(region)));
        self
    }

    /// Binds a region that is read, if there is one.
    pub fn read_if(self, index: u32, region: Option<Region<'a, B>>) -> Self {
        match region {
            Some(region) => self.read(index, region),
            None => self,
        }
    }

    /// Binds a region that is written.
    pub fn write(mut self, index: u32, region: Region<'a, B>) -> Self {
        self.arguments.push((index, Argument::Write(region)));
        self
    }

    /// Binds a region that is read and then written.
    pub fn update(self, index: u32, region: Region<'a, B>) -> Self {
        self.extend(index, region, region.touched)
    }

    /// Binds a region that is read, and of which `written` bytes are written beside those.
    pub fn extend(mut self, index: u32, region: Region<'a, B>, written: usize) -> Self {
        self.arguments.push((index, Argument::Update(region, written)));
        self
    }

    /// Gives constant bytes.
    pub fn bytes(mut self, index: u32, bytes: Vec<u8>) -> Self {
        self.arguments.push((index, Argument::Bytes(bytes)));
        self
    }

    /// Sets the length of a `[[threadgroup(n)]]` argument; rounded up to a multiple of 16.
    pub fn threadgroup_memory(mut self, index: u32, bytes: usize) -> Self {
        self.threadgroup_memory.push((index, bytes.next_multiple_of(16)));
        self
    }

    /// Sets the grid: threadgroups, and threads in each.
    pub fn grid(mut self, threadgroups: [usize; 3], threads: [usize; 3]) -> Self {
        self.threadgroups = threadgroups.map(|size| size as u32);
        self.threads = threads.map(|size| size as u32);
        self
    }

    /// Bytes read, as the regions say.
    pub fn bytes_read(&self) -> usize {
        self.total(|argument| match argument {
            Argument::Read(region) | Argument::Update(region, _) => region.touched,
            Argument::Write(_) | Argument::Bytes(_) => 0,
        })
    }

    /// Bytes written, as the regions say.
    pub fn bytes_written(&self) -> usize {
        self.total(|argument| match argument {
            Argument::Write(region) => region.touched,
            Argument::Update(_, written) => *written,
            Argument::Read(_) | Argument::Bytes(_) => 0,
        })
    }

    fn total(&self, bytes: impl Fn(&Argument<'a, B>) -> usize) -> usize {
        self.arguments.iter().map(|(_, argument)| bytes(argument)).sum()
    }
}

/// What a [`DryRun`] remembers of a dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// The kernel's host name.
    pub kernel: String,
    /// Function constants by index.
    pub constants: Vec<(u16, Constant)>,
    /// Threadgroups in each direction.
    pub threadgroups: [u32; 3],
    /// Threads of a threadgroup in each direction.
    pub threads: [u32; 3],
    /// Bytes read.
    pub read: usize,
    /// Bytes written.
    pub written: usize,
}

/// An encoder that only writes down what it is given. Its buffers are their names, or nothing at all.
#[derive(Debug)]
pub struct DryRun<B = ()> {
    /// The dispatches, in order.
    pub dispatches: Vec<Recorded>,
    buffers: std::marker::PhantomData<B>,
}

impl<B> DryRun<B> {
    /// An empty list.
    pub fn new() -> Self {
        DryRun { dispatches: Vec::new(), buffers: std::marker::PhantomData }
    }

    /// Bytes read and written by all dispatches.
    pub fn bytes(&self) -> usize {
        self.dispatches.iter().map(|recorded| recorded.read + recorded.written).sum()
    }
}

impl<B> Default for DryRun<B> {
    fn default() -> Self {
        DryRun::new()
    }
}

impl<B> Encoder for DryRun<B> {
    type Buffer = B;

    fn dispatch(&mut self, dispatch: &Dispatch<'_, B>) -> Result<()> {
        self.dispatches.push(Recorded {
            kernel: dispatch.kernel.clone(),
            constants: dispatch.constants.clone(),
            threadgroups: dispatch.threadgroups,
            threads: dispatch.threads,
            read: dispatch.bytes_read(),
            written: dispatch.bytes_written(),
        });
        Ok(())
    }
}
