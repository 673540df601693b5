//! What an instruction of the tiles' says.

/// The registers of an interrupted thread, in the system's order.
pub(in super::super) type Registers = [i64; 23];

/// Their places, by the processor's numbers.
const PLACES: [i32; 16] = [
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
    registers[PLACES[usize::from(number)] as usize] as usize
}

/// Rows in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Place {
    pub(in super::super) start: usize,
    pub(in super::super) stride: usize,
}

impl Place {
    pub(super) fn row(self, number: usize) -> usize {
        self.start.wrapping_add(self.stride.wrapping_mul(number))
    }
}

/// Tiles are numbers, places addresses. Products name the sums, then the first and the second
/// source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Operation {
    Shape(usize),
    Release,
    Zero(usize),
    Load(usize, Place),
    Store(usize, Place),
    AddBf16(usize, usize, usize),
    AddBytes(usize, usize, usize),
}

/// Bytes of code, one after the other.
struct Code(*const u8);

impl Code {
    /// # Safety
    /// The instruction goes on.
    unsafe fn next(&mut self) -> u8 {
        // SAFETY: the caller's.
        unsafe {
            let byte = *self.0;
            self.0 = self.0.add(1);
            byte
        }
    }

    /// A signed number of so many bytes, which are up to four.
    ///
    /// # Safety
    /// As above.
    unsafe fn number(&mut self, bytes: usize) -> i64 {
        let mut all = [0; 4];
        for byte in &mut all[..bytes] {
            // SAFETY: the caller's.
            *byte = unsafe { self.next() };
        }
        let unused = 8 * (4 - bytes) as u32;
        i64::from(i32::from_le_bytes(all).wrapping_shl(unused) >> unused)
    }
}

/// The fields of a prefix of three bytes (VEX) and of what follows it.
struct Fields {
    /// What makes the register, the index and the base ones of 8 to 15.
    register: u8,
    index: u8,
    base: u8,
    /// The third register.
    third: u8,
    prefix: u8,
    opcode: u8,
    /// How the operand in memory is given: 3 is a register.
    mode: u8,
    middle: u8,
    low: u8,
}

/// The operation at an address and the address behind it; nothing where it is none of the tiles'.
///
/// # Safety
/// An instruction stands at the address.
pub(in super::super) unsafe fn decode(
    start: *const u8,
    registers: &Registers,
) -> Option<(Operation, usize)> {
    let mut code = Code(start);
    // SAFETY: a byte is read only where those before it say that there is one more.
    unsafe {
        let fields = fields(&mut code)?;
        let sums = usize::from(fields.middle | fields.register);
        let first = usize::from(fields.low | fields.base);
        let third = usize::from(fields.third);
        let alone = third == 0;
        let operation = match (fields.opcode, fields.prefix, fields.mode) {
            (0x49, 0, 3) if alone && sums == 0 && first == 0 => Operation::Release,
            (0x49, 0, 0..3) if alone && sums == 0 => {
                // Here the index is a part of the address, as everywhere but in tiles' rows.
                Operation::Shape(place(&mut code, &fields, registers).row(1))
            }
            (0x49, 3, 3) if alone && first == 0 => Operation::Zero(sums),
            // With and without the hint that it will not be needed again.
            (0x4b, 1 | 3, 0..3) if alone && fields.low == 4 => {
                Operation::Load(sums, place(&mut code, &fields, registers))
            }
            (0x4b, 2, 0..3) if alone && fields.low == 4 => {
                Operation::Store(sums, place(&mut code, &fields, registers))
            }
            (0x5c, 2, 3) => Operation::AddBf16(sums, first, third),
            (0x5e, 1, 3) => Operation::AddBytes(sums, first, third),
            _ => return None,
        };
        Some((operation, code.0 as usize))
    }
}

/// # Safety
/// As of `decode`.
unsafe fn fields(code: &mut Code) -> Option<Fields> {
    // SAFETY: the caller's; no instruction that begins like this is shorter.
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
        // These bits are written inverted.
        let high = |bit: u8| if first >> bit & 1 == 0 { 8 } else { 0 };
        Some(Fields {
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

/// The operand in memory; without an index its stride is zero.
///
/// # Safety
/// As of `decode`.
unsafe fn place(code: &mut Code, fields: &Fields, registers: &Registers) -> Place {
    // SAFETY: the caller's.
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
        // In the first mode the place of this register means that there is none: a number of four
        // bytes alone, or what is that far behind the instruction.
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
        Place {
            start: start.wrapping_add_signed(offset as isize),
            stride,
        }
    }
}
