//! The decoder of AMX instructions.

/// The registers of an interrupted thread, in the order of the operating system.
pub(in super::super) type Registers = [i64; 23];

/// Their indices, by the register numbers of the instruction encoding.
const REGISTER_INDICES: [i32; 16] = [
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

fn register(registers: &Registers, number: u8) -> usize {
    registers[REGISTER_INDICES[usize::from(number)] as usize] as usize
}

/// The address of a tile's rows in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct TileAddress {
    pub(in super::super) start: usize,
    pub(in super::super) stride: usize,
}

impl TileAddress {
    pub(super) fn row(self, number: usize) -> usize {
        self.start.wrapping_add(self.stride.wrapping_mul(number))
    }
}

/// A decoded instruction. Multiplications have the sums, then the first and the second operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Operation {
    Configure(usize),
    Release,
    Zero(usize),
    Load(usize, TileAddress),
    Store(usize, TileAddress),
    AddBf16(usize, usize, usize),
    AddBytes(usize, usize, usize),
}

/// A reader of machine code.
struct CodeReader(*const u8);

impl CodeReader {
    /// # Safety
    /// The instruction has another byte.
    unsafe fn next(&mut self) -> u8 {
        // SAFETY: passed on to the caller.
        unsafe {
            let byte = *self.0;
            self.0 = self.0.add(1);
            byte
        }
    }

    /// A signed number of this many bytes, up to four.
    ///
    /// # Safety
    /// As above.
    unsafe fn number(&mut self, bytes: usize) -> i64 {
        let mut all = [0; 4];
        for byte in &mut all[..bytes] {
            // SAFETY: passed on to the caller.
            *byte = unsafe { self.next() };
        }
        let unused = 8 * (4 - bytes) as u32;
        i64::from(i32::from_le_bytes(all).wrapping_shl(unused) >> unused)
    }
}

/// The fields of a VEX prefix of three bytes, and of the opcode and ModRM byte after it.
struct VexFields {
    /// The high bit of the register, the index and the base: 8 or 0.
    register: u8,
    index: u8,
    base: u8,
    /// The third register.
    third: u8,
    prefix: u8,
    opcode: u8,
    /// The ModRM mode of the operand: 3 is a register, others are in memory.
    mode: u8,
    middle: u8,
    low: u8,
}

/// The operation at an address and the address behind it; none where it is not an AMX instruction.
///
/// # Safety
/// An instruction is at the address.
pub(in super::super) unsafe fn decode(
    start: *const u8,
    registers: &Registers,
) -> Option<(Operation, usize)> {
    let mut code = CodeReader(start);
    // SAFETY: a byte is read only where the bytes before it imply that there is another.
    unsafe {
        let fields = fields(&mut code)?;
        let sums = usize::from(fields.middle | fields.register);
        let first = usize::from(fields.low | fields.base);
        let third = usize::from(fields.third);
        let alone = third == 0;
        let operation = match (fields.opcode, fields.prefix, fields.mode) {
            (0x49, 0, 3) if alone && sums == 0 && first == 0 => Operation::Release,
            (0x49, 0, 0..3) if alone && sums == 0 => {
                // Here the index is part of the address; only for the rows of tiles it is the stride.
                Operation::Configure(address(&mut code, &fields, registers).row(1))
            }
            (0x49, 3, 3) if alone && first == 0 => Operation::Zero(sums),
            // With and without the non-temporal hint.
            (0x4b, 1 | 3, 0..3) if alone && fields.low == 4 => {
                Operation::Load(sums, address(&mut code, &fields, registers))
            }
            (0x4b, 2, 0..3) if alone && fields.low == 4 => {
                Operation::Store(sums, address(&mut code, &fields, registers))
            }
            (0x5c, 2, 3) => Operation::AddBf16(sums, first, third),
            (0x5e, 1, 3) => Operation::AddBytes(sums, first, third),
            _ => return None,
        };
        Some((operation, code.0 as usize))
    }
}

/// # Safety
/// As for `decode`.
unsafe fn fields(code: &mut CodeReader) -> Option<VexFields> {
    // SAFETY: passed on to the caller; no instruction with this prefix is shorter.
    unsafe {
        if code.next() != 0xc4 {
            return None;
        }
        let (first, second) = (code.next(), code.next());
        // The map of opcodes is 0F 38; there is no 64-bit and no 256-bit form.
        if first & 0x1f != 2 || second & 0x84 != 0 {
            return None;
        }
        let (opcode, operands) = (code.next(), code.next());
        // These bits are encoded inverted.
        let high = |bit: u8| if first >> bit & 1 == 0 { 8 } else { 0 };
        Some(VexFields {
            register: high(7),
            index: high(6),
            base: high(5),
            third: !second >> 3 & 15,
            prefix: second & 3,
            opcode,
            mode: operands >> 6,
            middle: operands >> 3 & 7,
            low: operands & 7,
        })
    }
}

/// The address of the operand in memory; without an index its stride is zero.
///
/// # Safety
/// As for `decode`.
unsafe fn address(code: &mut CodeReader, fields: &VexFields, registers: &Registers) -> TileAddress {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut base = fields.low;
        let mut stride = 0;
        if fields.low == 4 {
            let scaled = code.next();
            base = scaled & 7;
            let index = scaled >> 3 & 7 | fields.index;
            if index != 4 {
                stride = register(registers, index) << (scaled >> 6);
            }
        }
        // In the first mode this register number means that there is no base: only an offset of
        // four bytes, or an offset from the end of the instruction.
        let no_base = base == 5 && fields.mode == 0;
        let offset = match fields.mode {
            0 if !no_base => 0,
            1 => code.number(1),
            _ => code.number(4),
        };
        let start = if !no_base {
            register(registers, base | fields.base)
        } else if fields.low == 4 {
            0
        } else {
            code.0 as usize
        };
        TileAddress {
            start: start.wrapping_add_signed(offset as isize),
            stride,
        }
    }
}
