//! x
use engine::*;
use std::time::Instant;
fn main() {
    let t = Instant::now();
    let mut model = load(std::path::Path::new("models/minilm/1"), &LoadOptions{device: DeviceChoice::Cpu, ..Default::default()}).unwrap();
    println!("load {:?}", t.elapsed());
    let rss = |w: &str| { let s = std::fs::read_to_string("/proc/self/status").unwrap(); for l in s.lines().filter(|l| l.starts_with("VmRSS")||l.starts_with("VmHWM")) { println!("{w} {l}"); } };
    rss("loaded"); println!("weights {}", model.card.weight_bytes);
    let tok = model.tokenizer.clone().unwrap();
    for (n, l) in [(1usize,16usize),(32,16),(1,256),(8,256)] {
        let text = "lantern ".repeat(l-2);
        let s = Instant::now();
        for _ in 0..50 { tok.encode(Text::One(&text), Truncation::Right).unwrap(); }
        println!("tokenize {l}: {:?}", s.elapsed()/50);
        let row = tok.encode(Text::One(&text), Truncation::Right).unwrap();
        let rows: Vec<TextRow> = (0..n).map(|_| TextRow{tokens:&row, wanted: Wanted::Pooled}).collect();
        for _ in 0..3 { model.network.forward_text(&rows, &|| true).unwrap(); }
        let k = if n*l < 300 {100} else {20};
        let mut best = f64::MAX;
        let t = Instant::now();
        for _ in 0..k { let s=Instant::now(); model.network.forward_text(&rows, &|| true).unwrap(); best=best.min(s.elapsed().as_secs_f64()); }
        println!("{n} of {l}: mean {:.2} ms best {:.2} ms", t.elapsed().as_secs_f64()*1e3/k as f64, best*1e3);
        let last = std::cell::Cell::new(Instant::now());
        let times = std::cell::RefCell::new(vec![]);
        model.network.forward_text(&rows, &|| { times.borrow_mut().push(last.get().elapsed().as_micros()); last.set(Instant::now()); true}).unwrap();
        println!("   layers us {:?} + {}", &times.borrow()[1..], last.get().elapsed().as_micros());
    }
    rss("end");
}
