//! The binary `andon`.

mod allocator;
mod arguments;
mod client;
mod keys;
mod roles;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use arguments::{Andon, Command};

/// Calls allocate and free small buffers on many threads, and an unloaded model
/// must give its memory back. See docs/decisions/mimalloc.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    let command = platform::config::with_variables(Andon::command());
    let command = match platform::config::with_file(command, &arguments) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let matches = command.get_matches_from(arguments);
    let andon = match Andon::from_arg_matches(&matches) {
        Ok(andon) => andon,
        Err(error) => error.exit(),
    };
    match run(andon.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(command.cores())
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        match command {
            Command::Serve(arguments) => roles::serve(*arguments).await,
            Command::Gateway(arguments) => roles::gateway(*arguments).await,
            Command::Worker(arguments) => roles::worker(*arguments).await,
            Command::Models(arguments) => client::models(arguments).await,
            Command::Infer(arguments) => client::infer(arguments).await,
            Command::Bench(arguments) => client::bench(arguments).await,
            Command::Keys(arguments) => keys::keys(arguments),
            Command::Completions(arguments) => {
                arguments.print(&mut Andon::command());
                Ok(())
            }
        }
    });
    // A model that is still computing must not delay the exit.
    runtime.shutdown_background();
    outcome
}
