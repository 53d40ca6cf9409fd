//! The distribution of latencies as a picture.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{Direction, Report};
use super::table::Nanos;

const SIZE: (u32, u32) = (960, 540);
/// Of the kinds of request, in the order of the report: told apart by people who see no red or no green as well.
const COLOURS: [RGBColor; 3] = [
    RGBColor(0x1b, 0x62, 0xa8),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
];
/// Percentiles that have a line across.
const MARKED: [f64; 6] = [50.0, 90.0, 99.0, 99.9, 99.99, 99.999];
/// Nines of the vertical axis, at most: a histogram's counts say no more.
const NINES_MAX: f64 = 6.0;
/// Points of a curve for each nine.
const STEPS: u32 = 64;

/// The plot could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("the plot cannot be drawn: {0}")]
pub struct PlotError(String);

impl Report {
    /// The distribution of latencies as an SVG picture: how many requests took at most how long, with a scale on
    /// which each tenth of the rest is as high as the one before (90, 99, 99.9 %), for it is the slow ones that matter.
    ///
    /// # Errors
    ///
    /// [`PlotError`], if the drawing library finds something that it cannot draw.
    pub fn to_svg(&self) -> Result<String, PlotError> {
        let mut svg = String::new();
        self.draw(&mut svg)
            .map_err(|error| PlotError(error.to_string()))?;
        Ok(svg)
    }

    fn draw(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error + '_>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let kinds: Vec<_> = [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
        ]
        .into_iter()
        .zip(COLOURS)
        .filter_map(|((name, kind), colour)| Some((name, kind.as_ref()?, colour)))
        .filter(|(_, kind, _)| kind.total_ios != 0)
        .collect();
        let shortest = kinds
            .iter()
            .map(|(_, kind, _)| kind.lat_ns.min)
            .min()
            .unwrap_or(1)
            .max(1);
        let longest = kinds
            .iter()
            .map(|(_, kind, _)| kind.lat_ns.max)
            .max()
            .unwrap_or(1);
        let nines = kinds
            .iter()
            .map(|(_, kind, _)| nines_of(kind.total_ios))
            .fold(1.0, f64::max);
        let range = (real(shortest) * 0.9)..(real(longest.max(shortest + 1)) * 1.1);

        let mut chart = ChartBuilder::on(&root)
            .caption(self.headline(), ("sans-serif", 18))
            .margin(16)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(range.clone().log_scale(), 0.0..nines)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .y_labels(0)
            .x_desc("latency")
            .y_desc("requests that took at most so long")
            .x_label_formatter(&|value| Nanos(*value).to_string())
            .light_line_style(BLACK.mix(0.06))
            .bold_line_style(BLACK.mix(0.15))
            .draw()?;
        for mark in MARKED {
            let height = height_of(mark / 100.0);
            if height >= nines {
                continue;
            }
            let across = [(range.start, height), (range.end, height)];
            chart.draw_series(LineSeries::new(across, BLACK.mix(0.15)))?;
            let style = ("sans-serif", 13)
                .into_text_style(&root)
                .pos(Pos::new(HPos::Right, VPos::Center));
            let (_, y) = chart.backend_coord(&(range.start, height));
            root.draw_text(&format!("{mark}%"), &style, (76, y))?;
        }
        for (name, kind, colour) in kinds {
            let label = legend(name, kind);
            chart
                .draw_series(LineSeries::new(curve(kind), colour.stroke_width(2)))?
                .label(label)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 13))
            .draw()?;
        root.present()?;
        Ok(())
    }
}

/// Shares of requests, and how high they are drawn: 0.9 at 1, 0.99 at 2.
fn height_of(share: f64) -> f64 {
    -(1.0 - share).log10()
}

/// As far as there are requests that say something.
fn nines_of(requests: u64) -> f64 {
    real(requests).log10().clamp(1.0, NINES_MAX)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a picture has a thousand pixels"
)]
fn real(value: u64) -> f64 {
    value as f64
}

fn curve(kind: &Direction) -> impl Iterator<Item = (f64, f64)> {
    // No further than its own requests have something to say.
    let nines = nines_of(kind.total_ios);
    let steps = (1..).map(|step: u32| f64::from(step) / f64::from(STEPS));
    let points = steps
        .take_while(move |&height| height <= nines)
        .map(|height| {
            let share = 1.0 - 10f64.powf(-height);
            (real(kind.lat_ns.at_percentile(share * 100.0)), height)
        });
    std::iter::once((real(kind.lat_ns.min), 0.0)).chain(points)
}

fn legend(name: &str, kind: &Direction) -> String {
    let at = |percentile| Nanos(real(kind.lat_ns.at_percentile(percentile)));
    format!(
        "{name}: median {}, 99% {}, 99.9% {}",
        at(50.0),
        at(99.0),
        at(99.9)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_nine_is_as_high_as_the_one_before() {
        for (share, height) in [(0.0, 0.0), (0.9, 1.0), (0.99, 2.0), (0.999, 3.0)] {
            assert!((height_of(share) - height).abs() < 1e-9, "{share}");
        }
        assert!((nines_of(1_000) - 3.0).abs() < 1e-9);
        assert!((nines_of(0) - 1.0).abs() < 1e-9 && (nines_of(u64::MAX) - NINES_MAX).abs() < 1e-9);
    }
}
