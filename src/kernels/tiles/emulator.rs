//! AMX in software, for tests on CPUs without it: the instructions fault, and the handler of the fault does what the
//! manual says they do and goes on behind them. Each thread has its own tiles.
//!
//! Only what [`tiles`](super) uses is there. Anything else, and whatever the manual forbids (an unconfigured tile, a
//! shape that does not fit, a malformed configuration), ends the process as the CPU would.

use std::cell::Cell;
use std::sync::OnceLock;

/// One thread's tiles.
#[derive(Clone, Copy)]
struct Tiles {
    configured: bool,
    rows: [usize; 8],
    row_bytes: [usize; 8],
    data: [[[u8; 64]; 16]; 8],
}

thread_local! {
    static TILES: Cell<*mut Tiles> = const { Cell::new(std::ptr::null_mut()) };
}

/// Takes over the fault of unknown instructions, once. False where that is not possible.
pub fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        // SAFETY: an all-zero action is a valid one; the handler has the signature that SA_SIGINFO asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()) == 0
        }
    })
}

extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext; `rip` points to the instruction that faulted.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as *const u8;
        match Instruction::decode(rip, registers) {
            Some(instruction) if instruction.execute() => {
                registers[libc::REG_RIP as usize] += instruction.length as libc::greg_t;
            }
            _ => {
                let message = b"an instruction that the AMX emulator does not know, or a fault that AMX would raise\n";
                libc::write(2, message.as_ptr().cast(), message.len());
                libc::abort();
            }
        }
    }
}

struct Instruction {
    opcode: u8,
    /// The VEX prefix's `pp`: 0 none, 1 66, 2 F3, 3 F2.
    prefix: u8,
    /// First operand, and the number of a memory form's tile.
    reg: usize,
    rm: usize,
    third: usize,
    /// Address of the first row and from row to row, of a memory form.
    memory: Option<(usize, usize)>,
    length: usize,
}

impl Instruction {
    /// Reads a three-byte VEX instruction of map 0F38.
    unsafe fn decode(at: *const u8, registers: &[libc::greg_t]) -> Option<Instruction> {
        // SAFETY: an instruction that faulted as unknown has been fetched; what is read lies within it.
        unsafe {
            let byte = |i: usize| at.add(i).read();
            if byte(0) != 0xc4 || byte(1) & 0x1f != 2 {
                return None;
            }
            // R, X and B are inverted and extend the registers' numbers.
            let extension = |bit: u8| usize::from(byte(1) >> bit & 1 == 0) * 8;
            let (opcode, modrm) = (byte(3), byte(4));
            let mut length = 5;
            let (mode, rm) = (modrm >> 6, usize::from(modrm & 7));
            let memory = match mode {
                3 => None,
                _ => {
                    let general = |number: usize| registers[REGISTERS[number] as usize] as usize;
                    let (mut base, mut stride) = (rm + extension(5), 0);
                    if rm == 4 {
                        let sib = byte(length);
                        length += 1;
                        base = usize::from(sib & 7) + extension(5);
                        let index = usize::from(sib >> 3 & 7) + extension(6);
                        stride = if index == 4 { 0 } else { general(index) << (sib >> 6) };
                    }
                    // Base RBP or R13 without displacement would mean something else.
                    if mode == 0 && base % 8 == 5 {
                        return None;
                    }
                    let displacement = match mode {
                        1 => byte(length) as i8 as isize,
                        2 => at.add(length).cast::<i32>().read_unaligned() as isize,
                        _ => 0,
                    };
                    length += [0, 1, 4][usize::from(mode)];
                    Some((general(base).wrapping_add_signed(displacement), stride))
                }
            };
            let third = usize::from(!byte(2) >> 3 & 15);
            let reg = usize::from(modrm >> 3 & 7);
            Some(Instruction { opcode, prefix: byte(2) & 3, reg, rm, third, memory, length })
        }
    }

    /// Does it; false for what there is not or must not be.
    unsafe fn execute(&self) -> bool {
        // SAFETY: the thread's tiles are its own and live as long as the process; memory is what the program named.
        unsafe {
            let mut tiles = TILES.get();
            if tiles.is_null() {
                // The fault was raised by an instruction of our own, not within an allocation.
                tiles = Box::into_raw(Box::new(Tiles {
                    configured: false,
                    rows: [0; 8],
                    row_bytes: [0; 8],
                    data: [[[0; 64]; 16]; 8],
                }));
                TILES.set(tiles);
            }
            let tiles = &mut *tiles;
            match (self.opcode, self.prefix, self.memory) {
                (0x49, 0, Some((at, _))) => tiles.configure(at as *const u8),
                (0x49, 0, None) => {
                    tiles.configured = false;
                    (tiles.rows, tiles.row_bytes) = ([0; 8], [0; 8]);
                    true
                }
                (0x49, 3, None) if tiles.has(self.reg) => {
                    tiles.data[self.reg] = [[0; 64]; 16];
                    true
                }
                (0x4b, 3, Some((at, stride))) if tiles.has(self.reg) => {
                    let bytes = tiles.row_bytes[self.reg];
                    tiles.data[self.reg] = [[0; 64]; 16];
                    for row in 0..tiles.rows[self.reg] {
                        let from = at.wrapping_add(row.wrapping_mul(stride)) as *const u8;
                        from.copy_to(tiles.data[self.reg][row].as_mut_ptr(), bytes);
                    }
                    true
                }
                (0x4b, 2, Some((at, stride))) if tiles.has(self.reg) => {
                    for row in 0..tiles.rows[self.reg] {
                        let to = at.wrapping_add(row.wrapping_mul(stride)) as *mut u8;
                        to.copy_from(tiles.data[self.reg][row].as_ptr(), tiles.row_bytes[self.reg]);
                    }
                    true
                }
                (0x5c, 2, None) => tiles.multiply_bf16(self.reg, self.rm, self.third),
                _ => false,
            }
        }
    }
}

impl Tiles {
    fn has(&self, tile: usize) -> bool {
        self.configured && self.rows[tile] > 0
    }

    unsafe fn configure(&mut self, at: *const u8) -> bool {
        // SAFETY: a configuration has 64 bytes.
        let bytes = unsafe { at.cast::<[u8; 64]>().read() };
        let shape = |tile: usize| {
            let row_bytes = usize::from(u16::from_le_bytes([bytes[16 + 2 * tile], bytes[17 + 2 * tile]]));
            (usize::from(bytes[48 + tile]), row_bytes)
        };
        let valid = |(rows, row_bytes)| rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0);
        let reserved = bytes[2..16].iter().chain(&bytes[32..48]).chain(&bytes[56..]);
        if bytes[0] != 1
            || bytes[1] != 0
            || !(0..8).all(|tile| valid(shape(tile)))
            || reserved.into_iter().any(|b| *b != 0)
        {
            return false;
        }
        for tile in 0..8 {
            (self.rows[tile], self.row_bytes[tile]) = shape(tile);
        }
        self.configured = true;
        self.data = [[[0; 64]; 16]; 8];
        true
    }

    /// Whether these can be multiplied.
    fn fit(&self, sums: usize, first: usize, second: usize) -> bool {
        let distinct = sums != first && sums != second && first != second;
        let fits = self.row_bytes[first] / 4 == self.rows[second]
            && self.rows[sums] == self.rows[first]
            && self.row_bytes[sums] == self.row_bytes[second]
            && [sums, first, second]
                .iter()
                .all(|&tile| tile < 8 && self.has(tile) && self.row_bytes[tile].is_multiple_of(4));
        distinct && fits
    }

    /// `sums += first * second` of BF16: two chains for all that comes first and all that comes second in a pair, and their
    /// sum. Subnormal numbers are zeros.
    fn multiply_bf16(&mut self, sums: usize, first: usize, second: usize) -> bool {
        if !self.fit(sums, first, second) {
            return false;
        }
        for row in 0..self.rows[sums] {
            for column in 0..self.row_bytes[sums] / 4 {
                let at = 4 * column;
                let number = |tile: usize, row: usize, at: usize| {
                    let bytes = &self.data[tile][row][at..];
                    flush(f32::from_le_bytes([0, 0, bytes[0], bytes[1]]))
                };
                let mut chains = [0f32; 2];
                for k in 0..self.rows[second] {
                    for (t, chain) in chains.iter_mut().enumerate() {
                        let (x, w) = (number(first, row, 4 * k + 2 * t), number(second, k, at + 2 * t));
                        *chain = flush(x.mul_add(w, *chain));
                    }
                }
                let sum = flush(f32::from_le_bytes(std::array::from_fn(|t| self.data[sums][row][at + t])));
                let sum = flush(sum + flush(chains[0] + chains[1]));
                self.data[sums][row][at..at + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        true
    }
}

/// Zero for a subnormal number.
fn flush(value: f32) -> f32 {
    if value.is_subnormal() { 0f32.copysign(value) } else { value }
}

/// Where the kernel keeps the general registers, by their numbers.
const REGISTERS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];
